"""`vllm-zo doctor`: whether this machine and the installed vLLM have what training needs."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

import torch

import vllm_zo
from vllm_zo.compat.seams import SUPPORTED, SUPPORTED_RANGE, installed, seams
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.cli.slot_memory import slot_memory
from vllm_zo.entrypoints.cli.terminal_logging import quiet_vllm
from vllm_zo.entrypoints.llm.cpu_defaults import (
    FEW_CORES,
    has_native_bfloat16,
    is_cpu_build,
    kv_cache_gib,
)
from vllm_zo.job_memory import free_memory
from vllm_zo.objectives.graders.sandbox import why_open

OK, NOTE, MISSING = "ok", "note", "missing"
PLUGIN_GROUP, PLUGIN, SERVER_PLUGIN = "vllm.general_plugins", "zo", "zo_server"
MOVED = f"this release of vLLM has moved it; supported: {SUPPORTED_RANGE}"
INSTRUCTIONS_SHOWN = ("avx2", "avx512_f", "avx512_bf16", "amx_tile", "amx_bf16", "neon", "bf16", "sve")
"""Torch's names of the instruction sets that decide how fast a step is."""


@dataclass(frozen=True)
class Check:
    """The result of one check. `fix` says what to do where the status is not ok."""

    name: str
    status: str
    value: str
    fix: str = ""


def examine() -> list[Check]:
    """All checks, the most important first. It imports vLLM where vLLM is installed."""
    quiet_vllm()  # before `_seams` imports vLLM
    distribution = installed()
    return [
        *_versions(distribution),
        *_machine(),
        *_environment(),
        *(_seams() if distribution is not None else []),
    ]


def cluster(address: str) -> Iterator[Check]:
    """Checks of the Ray cluster at `address`: its nodes, what is installed on each, and our clusters on it.

    Raises:
        ConfigError: Ray is not installed, or no cluster is there.
    """
    from vllm_zo.entrypoints.cluster.on_ray.connect import connect

    connect(address)
    from vllm_zo.entrypoints.cluster.on_ray.clusters import statuses
    from vllm_zo.entrypoints.cluster.on_ray.nodes import nodes

    found = nodes()
    yield Check("ray", OK, f"{metadata.version('ray')}, {len(found)} node{'s' * (len(found) != 1)}")
    for node in found:
        name = "head node" if node.head else "node"
        value = f"{node.address}: {node.cpus} CPUs, {node.gpus} GPUs, {size(node.memory)}; {node.software}"
        if node.error is not None:
            yield Check(name, MISSING, f"{node.address}: {node.error}", "see `ray status` and the logs of the node")
        elif node.software != found[0].software:
            yield Check(name, MISSING, value, f"the head has {found[0].software}: install the same on all nodes")
        elif not node.shares:
            fix = f"keep jobs where all nodes see them: it does not see {os.getcwd()}"
            yield Check(name, NOTE, value, fix)
        else:
            yield Check(name, OK, value)
    for status in statuses(address):
        job = f"{status['job']}, {status['status']}, step {status['step']}" if "job" in status else "no job"
        yield Check("cluster", NOTE if "error" in status else OK, f"{status['cluster']}: {status.get('error', job)}")


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
    if version.startswith(SUPPORTED):
        return Check("vllm", OK, f"{name} {version}")
    fix = f"the engine tests were run on {', '.join(SUPPORTED)}; see below whether all seams are here"
    return Check("vllm", NOTE, f"{name} {version}", fix)


# --- machine ----------------------------------------------------------------------------------------------------------


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    yield Check(
        "platform", OK, f"{platform.platform()}, {'CPU' if is_cpu_build() else 'GPU'} build of torch, {cores} cores"
    )
    if not is_cpu_build():
        return
    has = torch.cpu.get_capabilities()
    shown = " ".join(name for name in INSTRUCTIONS_SHOWN if has.get(name)) or "none of those that matter"
    fix = "" if has_native_bfloat16() else "no bfloat16 instructions: --dtype float32 (dtype='float32') is faster"
    yield Check("cpu flags", NOTE if fix else OK, shown, fix)


# --- environment ------------------------------------------------------------------------------------------------------


def _environment() -> Iterator[Check]:
    yield _plugin_found()
    yield from _plugin_allowed()
    yield _grader_isolation()
    if is_cpu_build():
        yield from _cpu_environment()


def _plugin_found() -> Check:
    found = any(entry.name == PLUGIN for entry in metadata.entry_points(group=PLUGIN_GROUP))
    fix = "" if found else "install this package (pip install -e .): vLLM's processes find it by its entry point"
    return Check("plugin", OK if found else MISSING, f"{PLUGIN_GROUP}: {PLUGIN}", fix)


def _plugin_allowed() -> Iterator[Check]:
    """Our scheduler and worker load what they need themselves, so an allow-list without our plugins is only a note."""
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


def _grader_isolation() -> Check:
    """Whether a sandbox isolates Python graders. It matters only to servers started with --allow-python-graders."""
    if (why := why_open()) is None:
        return Check("Python graders", OK, "isolated by bubblewrap")
    fix = "install bubblewrap: a server's --allow-python-graders lets a client's code read what the server can read"
    return Check("Python graders", NOTE, why, fix)


def _cpu_environment() -> Iterator[Check]:
    """Settings that training chooses where they are unset, and what slows it down."""
    yield _kernels()
    cores = sorted(os.sched_getaffinity(0))
    if "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        yield Check("KV cache", OK, f"VLLM_CPU_KVCACHE_SPACE={os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB")
    else:
        yield Check("KV cache", OK, f"{kv_cache_gib(free_memory())} GiB; VLLM_CPU_KVCACHE_SPACE sets another")
    bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    if bind is None and len(cores) <= FEW_CORES:
        yield Check("threads", OK, f"{len(cores)}, bound to no core; VLLM_CPU_OMP_THREADS_BIND names cores")
    else:
        yield Check("threads", OK, f"VLLM_CPU_OMP_THREADS_BIND={bind or 'auto'}")
    # Containers and batch systems often set it to 1, and torch takes it as its number of threads without any message.
    if "OMP_NUM_THREADS" in os.environ and int(os.environ["OMP_NUM_THREADS"] or 0) < len(cores):
        yield Check("OMP_NUM_THREADS", NOTE, os.environ["OMP_NUM_THREADS"], f"{len(cores)} cores are there: unset it")


def _kernels() -> Check:
    from vllm_zo.worker.cpu import native  # it imports vLLM, which takes seconds

    if os.environ.get(native.SWITCH) == "0":
        return Check("CPU kernels", NOTE, f"{native.SWITCH}=0", "a small model's step takes up to half as long again")
    try:
        native.load()
    except native.FAILURES as e:
        fix = "install a C++ compiler (Debian, Ubuntu: apt install g++); until then steps take up to half as long again"
        return Check("CPU kernels", NOTE, f"not compiled: {e}", fix)
    return Check("CPU kernels", OK, "compiled for this machine")


# --- seams ------------------------------------------------------------------------------------------------------------


def _seams() -> Iterator[Check]:
    """A check for every attribute of vLLM that this package patches or extends."""
    for target, state in seams():
        if state == "missing":
            yield Check("seam", MISSING, f"{target}: not there", MOVED)
        else:
            yield Check("seam", OK, target if state == "ok" else f"{target}: not needed with this vLLM")


# --- slots ------------------------------------------------------------------------------------------------------------


def slots(model: str, zo: ZOTrainingConfig, dtype: str = "auto") -> Iterator[Check]:
    """Checks of the memory that training reserves for `model`, beside its weights.

    Raises:
        ConfigError: there is no such model, or no such dtype.
    """
    memory = slot_memory(model, zo, dtype)
    yield Check("model weights", OK, f"{size(memory.weights)}, {len(memory.modules)} linear layers")
    what = f"{zo.total_slots} of rank {zo.slot_rank}: {size(memory.training)}, {size(memory.slot)} each"
    # (bases + 1) * rank must fit into a slot, and LoZO's rank is 2: one rank-2 factor is the probe's own.
    bases = zo.slot_rank // 2 - 1
    room = f"{bases} bases of LoZO's rank 2" if bases > 0 else "no basis of LoZO's rank 2: give 8 or more"
    yield Check("training slots", OK, f"{what}; room for {room}")
    if not is_cpu_build():
        return
    kv_cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or kv_cache_gib(free_memory())) << 30
    wanted, free = memory.weights + memory.training + kv_cache, free_memory()
    value = f"{size(wanted)} with a KV cache of {size(kv_cache)}; {size(free)} are free"
    fix = "" if wanted <= free else "fewer --slots, a smaller --slot-rank, or less VLLM_CPU_KVCACHE_SPACE"
    yield Check("memory", NOTE if fix else OK, value, fix)


def size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
