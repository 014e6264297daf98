"""vLLM's CPU settings for a tool that has the machine to itself: the demo and the command line.

vLLM reads them from the environment when it is imported, so they are set before. Whatever the user has set stays.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from vllm_zo.worker.kernels.cpu_linear import is_emulated

GIB = 1 << 30
KV_CACHE_SHARE = 0.25
"""Of the free memory. vLLM's own default is 92 % of *all* memory, and refuses to start where less than that is free."""
MAX_KV_CACHE_GIB = 8
"""A group of 32 sequences of a few hundred tokens needs well under this, up to models of some billion parameters."""
FEW_CORES = 4
"""Up to here a core that vLLM keeps for its scheduler (which only waits while the model runs) is missed too much."""


def is_cpu_build() -> bool:
    """Whether the installed torch knows no accelerator. Imports no vLLM and touches no driver."""
    return torch.version.cuda is None and torch.version.hip is None


def apply_cpu_defaults(world_size: int = 1, in_process: bool = True) -> dict[str, str]:
    """Set what is unset of vLLM's CPU settings; returns what was chosen. Does nothing on other platforms.

    By default the engine core runs in this process: one fewer to start (20 s), and nothing to keep in step.

    Args:
        world_size: CPU workers (tensor parallel). With more than one, binding threads is left to vLLM.
        in_process: False for a server, whose engine core is another process in any case.
    """
    if not is_cpu_build():
        return {}
    chosen = {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib(free_memory()))}
    cores = sorted(os.sched_getaffinity(0))
    if world_size == 1:
        if in_process:
            chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if len(cores) <= FEW_CORES:
            chosen["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
            chosen["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    chosen = {name: value for name, value in chosen.items() if name not in os.environ}
    os.environ.update(chosen)
    return chosen


def kv_cache_gib(free_bytes: int) -> int:
    """Whole GiB for the KV cache, at least 1."""
    return max(1, min(MAX_KV_CACHE_GIB, int(free_bytes * KV_CACHE_SHARE) // GIB))


def free_memory() -> int:
    """Bytes this process may still take: of the machine, and of its container where that has a limit."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no cgroup v2 here, or its limit is "max"
        return available
    return min(available, limit - used)


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the first core as Linux names them."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def has_native_bfloat16() -> bool:
    """Without it a bfloat16 product is emulated, slower than float32."""
    return not is_emulated(torch.bfloat16)
