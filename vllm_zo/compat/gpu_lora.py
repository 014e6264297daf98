"""LoRA on CUDA with our low-rank product: one that knows what the slots of a probe share."""

from __future__ import annotations

from vllm_zo.compat.registry import Patch

SHARED_SHRINK = Patch(
    target="vllm.platforms.cuda:CudaPlatformBase.get_punica_wrapper",
    why="stock CUDA LoRA reads numbers back from the device whenever the batch changes, so that no step is prepared "
    "while one runs; its sums of a shrink are not the same from run to run, and it knows no used rank",
    how="names our wrapper, a subclass of PunicaWrapperGPU",
    upstream="none yet",
    remove_when="vLLM's LoRA metadata are made without waiting and its shrink is deterministic",
    series="none: written without a GPU at hand; upstream would want its numbers first",
    optional=True,  # not there in a build for CPU
)

WRAPPER = "vllm_zo.worker.kernels.gpu_lora.SharedShrinkPunicaWrapper"


def install() -> None:
    """For a training worker, before its model is loaded."""
    if SHARED_SHRINK.unneeded():
        return
    from vllm.platforms.cuda import CudaPlatformBase

    def get_punica_wrapper(cls: type) -> str:
        return WRAPPER

    SHARED_SHRINK.apply(CudaPlatformBase, "get_punica_wrapper", classmethod(get_punica_wrapper))
