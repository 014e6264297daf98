"""Linear layers on CPUs where vLLM's kernel is not the fastest; `worker/kernels/cpu_linear.py` has the code."""

from __future__ import annotations

from typing import Any

from vllm_zo.compat.registry import Patch

WIDENED_LINEAR = Patch(
    target="vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
    why=(
        "without AVX512-BF16 or AMX a 16-bit layer is multiplied by emulation, 3 to 8 times slower than in float32; "
        "without AVX-512 the packed float32 product is the slower one for the rows of a training step"
    ),
    how=(
        "16-bit layers get our product, which widens the weight block by block; small float32 layers of a training "
        "engine keep their plain weight for batches of many rows; all others are left to vLLM"
    ),
    upstream="none yet",
    remove_when="vLLM's CPU backend chooses by instructions and batch size",
    series="none: a choice of kernel for old CPUs; upstream would want numbers from more of them first",
)


def install() -> None:
    from vllm.model_executor.layers import utils

    from vllm_zo.worker.kernels.cpu_linear import is_emulated, is_kept_plain, plain_for_many_rows, widened_linear

    original = utils.dispatch_cpu_unquantized_gemm

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight
        if weight.is_meta or weight.ndim != 2:
            original(layer, remove_weight)
        elif is_emulated(weight.dtype):
            layer.cpu_linear = widened_linear
        elif remove_weight and is_kept_plain(layer):  # an embedding or LM head keeps its own, and has few rows
            original(layer, False)
            layer.cpu_linear = plain_for_many_rows(layer.cpu_linear)
        else:
            original(layer, remove_weight)

    WIDENED_LINEAR.apply(utils, "dispatch_cpu_unquantized_gemm", dispatch_cpu_unquantized_gemm)
