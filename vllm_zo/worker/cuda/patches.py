"""The patch of a CUDA worker: LoRA with our low-rank product, which knows what the slots of a probe share."""

from __future__ import annotations

from vllm_zo.compat.registry import Patch

SHARED_SHRINK = Patch(
    target="vllm.platforms.cuda:CudaPlatformBase.get_punica_wrapper",
    why="stock CUDA LoRA reads numbers back from the device whenever the batch changes, so that no step can be "
    "prepared while one runs; the sums of its shrink differ from run to run, and it reads a slot at its padded rank",
    how="names our wrapper, a subclass of PunicaWrapperGPU; only in a training worker",
    upstream="none yet",
    remove_when="vLLM's LoRA metadata are made without waiting and its shrink is deterministic",
    series="none: written without a GPU at hand; upstream would want its numbers first",
    optional=True,  # the target is missing in a build for CPU
)

WRAPPER = "vllm_zo.worker.cuda.lora.SharedShrinkPunicaWrapper"


def install() -> None:
    """Apply the patch. For a training worker, before its model is loaded.

    Raises:
        PatchConflictError: another package has replaced the target.
    """
    if SHARED_SHRINK.unneeded():
        return
    from vllm.platforms.cuda import CudaPlatformBase

    def get_punica_wrapper(cls: type) -> str:
        return WRAPPER

    SHARED_SHRINK.apply(CudaPlatformBase, "get_punica_wrapper", classmethod(get_punica_wrapper))
