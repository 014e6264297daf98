"""LoRA on the CPU backend as grouped GEMMs instead of one gathered copy of the adapter a token."""

from __future__ import annotations

from vllm_zo.compat.registry import Patch

GROUPED_LORA = Patch(
    target="vllm.platforms.cpu:CpuPlatform.get_punica_wrapper",
    why="stock CPU LoRA gathers A and B per token (lora_ops.py), which dominates a step of a few hundred tokens",
    how="names our wrapper, a subclass of PunicaWrapperCPU with one GEMM per run of tokens that share an adapter",
    upstream="none yet",
    remove_when="vLLM's CPU backend groups tokens by adapter",
)


def install() -> None:
    from vllm.platforms.cpu import CpuPlatform

    def get_punica_wrapper(cls: type) -> str:
        return "vllm_zo.worker.kernels.cpu_lora.GroupedPunicaWrapper"

    GROUPED_LORA.apply(CpuPlatform, "get_punica_wrapper", classmethod(get_punica_wrapper))
