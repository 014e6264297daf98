"""vLLM's CPU settings for training: how much memory the KV cache takes, and on which cores the threads run.

vLLM reads them from the environment when it makes an engine. `LLM(..., zo_training=True)` sets those that are unset. A
program that also wants the engine in its own process calls `vllm_zo.apply_cpu_defaults()` before that; the command
line does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from vllm_zo.errors import ConfigError
from vllm_zo.job_memory import GIB, free_memory
from vllm_zo.worker.cpu.linear import is_emulated

KV_CACHE_SHARE = 0.25
"""The KV cache's share of the free memory. vLLM takes 92 % of *all* memory, and does not start where less is free."""
MAX_KV_CACHE_GIB = 8
"""Largest KV cache. A group of 32 sequences of a few hundred tokens needs well under this, with models of up to some
billion parameters."""
FEW_CORES = 4
"""With at most so many cores the model gets all of them, and the system places its threads. vLLM would keep a core free
for its scheduler, which only waits while the model runs, and bind one thread to each other: beside another program, all
of them would wait at every operator for the one whose core is taken. And the worker needs no process of its own."""
SLEEP_SOON = {"GOMP_SPINCOUNT": "60000"}
"""Threads that have all cores must give them up when there is nothing to multiply: those of GNU OpenMP look for more
work 300,000 times before they sleep, for milliseconds. With 60,000 they stay awake from one operator to the next, and
not much longer; `worker/cpu/crowding.py` lets them sleep sooner beside other programs (docs/performance.md). Only a
process that is started after this sees it: the engine of a server is."""


def is_cpu_build() -> bool:
    """Whether the installed torch is built without CUDA and ROCm. It imports no vLLM and starts no driver."""
    # torch.cuda.is_available() would ask the driver, and after that a forked engine process could not use CUDA.
    return torch.version.cuda is None and torch.version.hip is None


def apply_cpu_defaults(
    world_size: int = 1, in_process: bool = True, kv_cache: bool = True, engines: int = 1
) -> dict[str, str]:
    """Set those of vLLM's CPU settings that are unset; returns the variables that it has set. Only on a CPU build.

    By default the engine core runs in this process. That saves starting a second process, which takes 20 s.

    Args:
        world_size: number of CPU workers (tensor parallel). With more than one, vLLM chooses the cores of each.
        in_process: False where the engine core may be another process: a server, or `finetune(wait=False)`.
        kv_cache: False where the engine's options say how large the KV cache is: the environment would overrule them.
        engines: number of engines (data parallel), which share the cores and the memory.

    Raises:
        ConfigError: there are more engines than cores, or the user's list of cores is not one for each.
    """
    if not is_cpu_build():
        return {}
    share = max(1, kv_cache_gib(free_memory()) // engines)
    chosen = {"VLLM_CPU_KVCACHE_SPACE": str(share)} if kv_cache else {}
    cores = sorted(os.sched_getaffinity(0))
    if engines > 1:
        chosen |= {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **SLEEP_SOON}
        given = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
        if given is None:
            chosen["VLLM_CPU_OMP_THREADS_BIND"] = _shares_of(cores, engines, world_size)
        elif given not in ("auto", "nobind") and (parts := len(given.split("|"))) != engines * world_size:
            raise ConfigError(
                f"VLLM_CPU_OMP_THREADS_BIND={given!r}: {parts} lists of cores for {engines * world_size} workers; give "
                'one for each ("0|1|..."), or unset it.'
            )
    elif world_size == 1:
        if in_process:
            chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if len(cores) <= FEW_CORES:
            chosen |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **SLEEP_SOON}
    chosen = {name: value for name, value in chosen.items() if name not in os.environ}
    os.environ.update(chosen)
    return chosen


def _shares_of(cores: Sequence[int], engines: int, world_size: int) -> str:
    """The cores of each worker as vLLM reads them: of the first engine's ranks, then of the next one's."""
    each, parts = len(cores) // (engines * world_size), range(engines * world_size)
    if each == 0:
        ranks = f" of {world_size} ranks each" if world_size > 1 else ""
        raise ConfigError(
            f"data_parallel_size={engines}{ranks}: this process may use {len(cores)} cores; start fewer engines, or "
            'name the cores of each with VLLM_CPU_OMP_THREADS_BIND="0|1|...".'
        )
    return "|".join(",".join(map(str, cores[part * each : (part + 1) * each])) for part in parts)


def kv_cache_gib(free_bytes: int) -> int:
    """Whole GiB for the KV cache, at least 1."""
    return max(1, min(MAX_KV_CACHE_GIB, int(free_bytes * KV_CACHE_SHARE) // GIB))


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself. Others emulate it, which is slower than float32."""
    return not is_emulated(torch.bfloat16)
