"""Linear layers on CPUs with AVX-512, by our own products: `tiles.cpp` (bfloat16 with AMX) and `panels.cpp` (float32,
and bfloat16 without AMX).

vLLM multiplies with oneDNN there. That waits for each layer's weights to come from memory. With AMX it builds a kernel
for each row count it meets, 20 ms for a layer's four products, and a step has another row count than the one before;
and at some row counts it leaves all of a product to one thread. Ours adds the low-rank part of an adapter before a sum
is stored, where a product of its own would read and write every output once more.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import CompilationMode, get_current_vllm_config_or_none

from vllm_zo.worker.cpu import native


class FusedLinear:
    """A layer's product, as vLLM calls it (`cpu_linear`). It keeps a packed copy of the weight, (O, I)."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = native.pack(weight)
        self.outputs, self.inputs = weight.shape

    def __call__(self, x: Tensor, _: Any, bias: Tensor | None) -> Tensor:
        """`x W^T + bias`. x: (..., I), bias: (O,) -> (..., O). The layer's own weight, which vLLM passes, is empty."""
        y = native.product(x.reshape(-1, self.inputs), self._packed, self.outputs, bias)
        return y.view(*x.shape[:-1], self.outputs)

    def weight(self) -> Tensor:
        """The layer's weight, (O, I), unpacked."""
        return native.unpack(self._packed, self.outputs, self.inputs)

    def with_low_rank(self, x: Tensor, bias: Tensor | None, factors: native.Factors, runs: Tensor) -> Tensor:
        """`x W^T + bias + x A^T B^T`. x: (T, I) -> (T, O); factors, runs: as in `native.low_rank`."""
        return native.product(x, self._packed, self.outputs, bias, factors, runs)


def fits(weight: Tensor) -> bool:
    """Whether a layer with this weight (O, I) gets our product."""
    return native.kind_of(weight.dtype) is not None and not _compiled()


def _compiled() -> bool:
    """Whether vLLM is loading a model that it will compile. A compiler knows its own operators only."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.compilation_config.mode != CompilationMode.NONE
