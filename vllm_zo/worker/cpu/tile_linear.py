"""Linear layers with bfloat16 weights on CPUs with AMX, by our own product (`tiles.cpp`).

vLLM multiplies with oneDNN there. That builds a kernel for each row count it meets, 20 ms for a layer's four products,
and a step has another row count than the one before; and at some row counts it leaves all of a product to one thread.
Ours takes the low-rank part of an adapter through the same tiles, where a product of its own would read and write every
output once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import CompilationMode, get_current_vllm_config_or_none

from vllm_zo.worker.cpu import native


class TileLinear:
    """A layer's product, as vLLM calls it (`cpu_linear`). It keeps a packed copy of the weight, (O, I)."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = native.pack_tiles(weight)
        self.outputs, self.inputs = weight.shape

    def __call__(self, x: Tensor, _: Any, bias: Tensor | None) -> Tensor:
        """`x W^T + bias`. x: (..., I), bias: (O,) -> (..., O). The layer's own weight, which vLLM passes, is empty."""
        y = native.tile_product(x.reshape(-1, self.inputs), self._packed, self.outputs, bias)
        return y.view(*x.shape[:-1], self.outputs)

    def weight(self) -> Tensor:
        """The layer's weight, (O, I), unpacked."""
        return native.unpack_tiles(self._packed, self.outputs, self.inputs)

    def with_low_rank(self, x: Tensor, bias: Tensor | None, factors: native.Factors, runs: Tensor) -> Tensor:
        """`x W^T + bias + x A^T B^T`. x: (T, I) -> (T, O); factors, runs: as in `native.low_rank`."""
        return native.tile_product(x, self._packed, self.outputs, bias, factors, runs)


def fits(weight: Tensor) -> bool:
    """Whether a layer with this weight (O, I) gets our product."""
    return weight.dtype == torch.bfloat16 and native.has_tiles() and native.library() is not None and not _compiled()


def _compiled() -> bool:
    """Whether vLLM is loading a model that it will compile. A compiler knows its own operators only."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.compilation_config.mode != CompilationMode.NONE
