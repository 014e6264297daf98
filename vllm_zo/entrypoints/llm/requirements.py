"""The run-time patches that a training engine needs before it is made."""

from __future__ import annotations

from vllm_zo import compat
from vllm_zo.compat import engine_core


def require_patches() -> None:
    """Apply the patches that every process of a training engine needs.

    Raises:
        PatchConflictError: the installed vLLM lacks an attribute, or another plugin has replaced it.
    """
    compat.require(engine_core.install, _install_platforms)


def _install_platforms() -> None:
    """Apply the patches of the CPU. The CUDA worker applies its only patch itself, so that an engine that only serves
    keeps vLLM's LoRA kernels."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm_zo.worker.cpu import patches

        patches.install()
