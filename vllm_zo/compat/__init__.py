"""Run-time patches of vLLM, one file a seam. `install()` is idempotent and runs in every process that needs it."""

from __future__ import annotations


def install() -> None:
    """Apply every patch that the engine needs. vLLM calls this as a general plugin; our scheduler and worker call it
    too, because `VLLM_PLUGINS` is an allow-list that may leave the plugin out."""
    global _installed
    if _installed:
        return
    _installed = True
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
