"""Which cores or GPUs each engine of a machine gets, as the environment of its process."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vllm_zo.entrypoints.llm.cpu_defaults import free_memory, is_cpu_build, kv_cache_gib
from vllm_zo.errors import ConfigError

FOREIGN = ("VLLM_DP_", "MASTER_")
FOREIGN_NAMES = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE"})
"""Variables of a launcher around this program: an engine would take them for its own."""


def is_foreign(name: str) -> bool:
    return name.startswith(FOREIGN) or name in FOREIGN_NAMES


def environments(
    engines: int, per_engine: int, devices: Sequence[Sequence[int]] | None = None, *, kv_cache: bool = True
) -> list[dict[str, str]]:
    """The environment of each engine's process: this one's, with its share of the cores or GPUs.

    Args:
        per_engine: workers of an engine, tensor-parallel ranks and pipeline stages.
        devices: the cores (on a CPU) or GPUs of each engine; None: equal shares of those that this process may use.
        kv_cache: whether each engine gets a share of the memory for its KV cache; False where its options say how much.

    Raises:
        ConfigError: there are fewer cores or GPUs than ranks, or `devices` does not name some for every engine.
    """
    cpu = is_cpu_build()
    if devices is None:
        devices = _equal_shares(_cores() if cpu else _gpus(), engines, per_engine, "cores" if cpu else "GPUs")
    if len(devices) != engines or any(len(of_engine) < per_engine for of_engine in devices):
        raise ConfigError(
            f"devices={devices!r}: expected {engines} lists, one for each engine, of at least {per_engine} each."
        )
    common = {name: value for name, value in os.environ.items() if not is_foreign(name)}
    # The engine's loop and its messages share one thread, so that a kill ends the whole engine and nothing else.
    common["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not cpu:
        return [common | {"CUDA_VISIBLE_DEVICES": _listed(of_engine)} for of_engine in devices]
    if kv_cache and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        common["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, kv_cache_gib(free_memory()) // engines))
    return [common | _on_cores(of_engine, per_engine) for of_engine in devices]


def _on_cores(cores: Sequence[int], ranks: int) -> dict[str, str]:
    parts = [_listed(cores[rank::ranks]) for rank in range(ranks)]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(parts),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(len(cores) // ranks),
    }


def _equal_shares(available: Sequence[int], engines: int, per_engine: int, what: str) -> list[Sequence[int]]:
    each = len(available) // engines
    if each < per_engine:
        ranks = f" of {per_engine} ranks each" if per_engine > 1 else ""
        raise ConfigError(
            f"engines={engines}{ranks}: this process may use {len(available)} {what}; start fewer engines, or name the "
            f"{what} of each with devices=[[...], ...]."
        )
    return [available[index * each : (index + 1) * each] for index in range(engines)]


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def _gpus() -> list[int]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [int(number) for number in visible.split(",") if number.strip()]
    import torch

    return list(range(torch.cuda.device_count()))


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
