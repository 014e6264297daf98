"""16-bit linear layers on a CPU that has no 16-bit matrix instructions."""

from __future__ import annotations

from typing import Any

from vllm_zo.compat.registry import Patch

WIDENED_LINEAR = Patch(
    target="vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
    why="without AVX512-BF16 or AMX a 16-bit layer is multiplied by emulation, 3 to 8 times slower than in float32",
    how="such layers get our product, which widens the weight block by block; all others are left to vLLM",
    upstream="none yet",
    remove_when="vLLM's CPU backend widens 16-bit weights where the CPU cannot multiply them",
    series="none: a choice of kernel for old CPUs; upstream would want numbers from more of them first",
)


def install() -> None:
    from vllm.model_executor.layers import utils

    from vllm_zo.worker.kernels.cpu_linear import is_emulated, widened_linear

    original = utils.dispatch_cpu_unquantized_gemm

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight
        if weight.is_meta or weight.ndim != 2 or not is_emulated(weight.dtype):
            original(layer, remove_weight)
        else:
            layer.cpu_linear = widened_linear

    WIDENED_LINEAR.apply(utils, "dispatch_cpu_unquantized_gemm", dispatch_cpu_unquantized_gemm)
