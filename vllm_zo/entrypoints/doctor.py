"""`vllm-zo doctor`: whether this machine and the installed vLLM have what training needs."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

import vllm_zo
from vllm_zo.compat.seams import SUPPORTED, installed, seams
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.cpu_defaults import (
    FEW_CORES,
    cpu_flags,
    free_memory,
    has_native_bfloat16,
    is_cpu_build,
    kv_cache_gib,
)
from vllm_zo.entrypoints.logs import quiet_vllm
from vllm_zo.entrypoints.slot_memory import slot_memory

OK, NOTE, MISSING = "ok", "note", "missing"
PLUGIN_GROUP, PLUGIN, SERVER_PLUGIN = "vllm.general_plugins", "zo", "zo_server"
MOVED = f"this release of vLLM has moved it; supported: {SUPPORTED}"
TESTED = ("0.30", "0.31", "0.32")
"""Releases on which the engine tests were run (docs/compatibility.md)."""
FLAGS_SHOWN = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")


@dataclass(frozen=True)
class Check:
    """One thing looked at. `fix` says what to do where the status is not ok."""

    name: str
    status: str
    value: str
    fix: str = ""


def examine() -> list[Check]:
    """All checks, in the order they are worth reading. Imports vLLM where it is installed."""
    quiet_vllm()
    distribution = installed()
    return [
        *_versions(distribution),
        *_machine(),
        *_environment(),
        *(_seams() if distribution is not None else []),
    ]


def to_json(checks: Iterable[Check]) -> str:
    return json.dumps([asdict(check) for check in checks], indent=1)


def as_text(checks: Iterable[Check]) -> str:
    lines = []
    for check in checks:
        lines.append(f"{check.status:8}{check.name:24}{check.value}")
        if check.fix:
            lines.append(f"{'':32}-> {check.fix}")
    return "\n".join(lines)


# --- versions ---------------------------------------------------------------------------------------------------------


def _versions(distribution: tuple[str, str] | None) -> Iterator[Check]:
    python = sys.version_info[:2]
    supported = (3, 11) <= python <= (3, 13)
    yield Check(
        "python", OK if supported else MISSING, platform.python_version(), "" if supported else "use 3.11 to 3.13"
    )
    yield Check("vllm-zo", OK, vllm_zo.__version__)
    if distribution is None:
        yield Check("vllm", MISSING, "not installed", "pip install 'vllm-zo[cpu]' or 'vllm-zo[cuda]' (see README)")
    else:
        yield _vllm_version(*distribution)
    yield Check("torch", OK, metadata.version("torch"))


def _vllm_version(name: str, version: str) -> Check:
    if version.startswith(TESTED):
        return Check("vllm", OK, f"{name} {version}")
    fix = f"the engine tests were run on {', '.join(TESTED)}; see below whether all seams are here"
    return Check("vllm", NOTE, f"{name} {version}", fix)


# --- machine ----------------------------------------------------------------------------------------------------------


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    yield Check(
        "platform", OK, f"{platform.platform()}, {'CPU' if is_cpu_build() else 'GPU'} build of torch, {cores} cores"
    )
    if not is_cpu_build():
        return
    flags = cpu_flags()
    shown = " ".join(flag for flag in FLAGS_SHOWN if flag in flags) or "none of those that matter"
    fix = "" if has_native_bfloat16() else "no bfloat16 instructions: --dtype float32 (dtype='float32') is faster"
    yield Check("cpu flags", NOTE if fix else OK, shown, fix)


# --- environment ------------------------------------------------------------------------------------------------------


def _environment() -> Iterator[Check]:
    yield _plugin_found()
    yield from _plugin_allowed()
    if is_cpu_build():
        yield from _cpu_environment()


def _plugin_found() -> Check:
    found = any(entry.name == PLUGIN for entry in metadata.entry_points(group=PLUGIN_GROUP))
    fix = "" if found else "install this package (pip install -e .): vLLM's processes find it by its entry point"
    return Check("plugin", OK if found else MISSING, f"{PLUGIN_GROUP}: {PLUGIN}", fix)


def _plugin_allowed() -> Iterator[Check]:
    """Our scheduler and worker load what they need themselves, so an allow-list without us is no failure."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        yield Check("VLLM_PLUGINS", OK, "unset: all plugins load, but for those that add HTTP routes")
        return
    names = allowed.split(",")
    missing = [name for name in (PLUGIN, SERVER_PLUGIN) if name not in names]
    if not missing:
        yield Check("VLLM_PLUGINS", OK, allowed)
    else:
        wanted = ",".join(filter(None, [*names, *missing]))
        why = "the list leaves out " + " and ".join(map(repr, missing)) + f" ({SERVER_PLUGIN!r}: the training server)"
        yield Check("VLLM_PLUGINS", NOTE, repr(allowed), f"{why}: VLLM_PLUGINS={wanted}")
    groups = [group for group in metadata.entry_points().groups if group.startswith("vllm.")]
    known = {point.name for group in groups for point in metadata.entry_points(group=group)}
    if unknown := [name for name in names if name and name not in known]:
        yield Check("VLLM_PLUGINS", NOTE, repr(allowed), f"no installed plugin is called {', '.join(unknown)}")


def _cpu_environment() -> Iterator[Check]:
    """What `vllm-zo train` and the demo choose by themselves, and a program of one's own does not."""
    cores = sorted(os.sched_getaffinity(0))
    if "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        yield Check("KV cache", OK, f"VLLM_CPU_KVCACHE_SPACE={os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB")
    else:
        fix = "VLLM_CPU_KVCACHE_SPACE=4 (GiB), or less; the default is most of the machine's memory"
        yield Check("KV cache", NOTE, "VLLM_CPU_KVCACHE_SPACE is unset", fix)
    bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    if bind is None and len(cores) <= FEW_CORES:
        fix = f"VLLM_CPU_OMP_THREADS_BIND={','.join(map(str, cores))} VLLM_CPU_NUM_OF_RESERVED_CPU=0"
        yield Check("threads", NOTE, f"vLLM keeps one of {len(cores)} cores for its scheduler", fix)
    else:
        yield Check("threads", OK, f"VLLM_CPU_OMP_THREADS_BIND={bind or 'auto'}")
    if "OMP_NUM_THREADS" in os.environ and int(os.environ["OMP_NUM_THREADS"] or 0) < len(cores):
        yield Check("OMP_NUM_THREADS", NOTE, os.environ["OMP_NUM_THREADS"], f"{len(cores)} cores are there: unset it")


# --- seams ------------------------------------------------------------------------------------------------------------


def _seams() -> Iterator[Check]:
    """Every attribute of vLLM that is patched or extended, by name."""
    for target, state in seams():
        if state == "missing":
            yield Check("seam", MISSING, f"{target}: not there", MOVED)
        else:
            yield Check("seam", OK, target if state == "ok" else f"{target}: not needed with this vLLM")


# --- slots ------------------------------------------------------------------------------------------------------------


def slots(model: str, zo: ZOTrainingConfig, dtype: str = "auto") -> Iterator[Check]:
    """What training reserves for `model`, beside its weights.

    Raises:
        ConfigError: the model is not known.
    """
    memory = slot_memory(model, zo, dtype)
    yield Check("model weights", OK, f"{_size(memory.weights)}, {memory.modules} linear layers")
    what = f"{zo.total_slots} of rank {zo.slot_rank}: {_size(memory.training)}, {_size(memory.slot)} each"
    bases = zo.slot_rank // 2 - 1
    room = f"{bases} bases of LoZO's rank 2" if bases > 0 else "no basis of LoZO's rank 2: give 8 or more"
    yield Check("training slots", OK, f"{what}; room for {room}")
    if not is_cpu_build():
        return
    kv_cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or kv_cache_gib(free_memory())) << 30
    wanted, free = memory.weights + memory.training + kv_cache, free_memory()
    value = f"{_size(wanted)} with a KV cache of {_size(kv_cache)}; {_size(free)} are free"
    fix = "" if wanted <= free else "fewer --slots, a smaller --slot-rank, or less VLLM_CPU_KVCACHE_SPACE"
    yield Check("memory", NOTE if fix else OK, value, fix)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
