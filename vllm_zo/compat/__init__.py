"""Run-time patches of vLLM, one file a seam, applied once in every process that needs them."""

from __future__ import annotations

import logging

from vllm_zo.compat.registry import PatchConflictError

logger = logging.getLogger("vllm.zo.compat")


def install() -> None:
    """vLLM calls this as a general plugin, in every process and whether its engine trains or not: a vLLM that the
    patches do not fit goes on without them. What trains calls `require`."""
    try:
        require()
    except PatchConflictError as error:
        logger.warning("vllm-zo cannot train with this vLLM: %s", error)


def require() -> None:
    """Apply every patch that a training engine needs. Scheduler and worker call it too, because `VLLM_PLUGINS` is an
    allow-list that may leave the plugin out.

    Raises:
        PatchConflictError: the installed vLLM lacks an attribute, or another plugin has replaced it.
    """
    global _installed
    if _installed:
        return
    try:
        _apply_all()
    except (ImportError, AttributeError) as error:
        raise PatchConflictError(f"it lacks what is to be patched ({error}); run `vllm-zo doctor`") from error
    _installed = True


def _apply_all() -> None:
    from vllm.platforms import current_platform

    from vllm_zo.compat import engine_core

    engine_core.install()
    if current_platform.is_cpu():
        from vllm_zo.compat import cpu_linear, cpu_lora, kernel_overrides, shared_rows

        cpu_linear.install()
        cpu_lora.install()
        kernel_overrides.install()
        shared_rows.install()


_installed = False
