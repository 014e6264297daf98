"""LoRA on the CPU backend as grouped GEMMs instead of one gathered copy of the adapter a token."""

from __future__ import annotations

from vllm_zo.compat.registry import Patch

GROUPED_LORA = Patch(
    target="vllm.platforms.cpu:CpuPlatform.get_punica_wrapper",
    why="stock CPU LoRA gathers A and B per token (lora_ops.py), which dominates a step of a few hundred tokens",
    how="names our wrapper, a subclass of PunicaWrapperCPU with one GEMM per run of tokens that share an adapter",
    upstream="none yet",
    remove_when="vLLM's CPU backend groups tokens by adapter",
    series="0005-cpu-grouped-lora.patch",
    built_in="vllm.lora.punica_wrapper.punica_selector:choose_punica_wrapper",
)


WRAPPER = "vllm_zo.worker.kernels.cpu_lora.GroupedPunicaWrapper"


def install() -> None:
    from vllm.platforms.cpu import CpuPlatform

    def get_punica_wrapper(cls: type) -> str:
        return WRAPPER

    GROUPED_LORA.apply(CpuPlatform, "get_punica_wrapper", classmethod(get_punica_wrapper))


def choose_wrapper() -> None:
    """For a training worker, before its model is loaded: where vLLM groups tokens by itself the patch has stepped
    aside, but only our wrapper knows what the slots of a probe share."""
    if GROUPED_LORA.unneeded():
        from vllm.lora.punica_wrapper.punica_selector import choose_punica_wrapper

        choose_punica_wrapper(WRAPPER)
