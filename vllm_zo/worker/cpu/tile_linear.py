"""Linear layers with bfloat16 weights on CPUs with AMX, by our own product (`tiles.cpp`).

vLLM multiplies with oneDNN there. That builds a kernel for each row count it meets, 20 ms for a layer's four products,
and a step has another row count than the one before; and at some row counts it leaves all of a product to one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.config import CompilationMode, get_current_vllm_config_or_none

from vllm_zo.worker.cpu import native


def fits(weight: Tensor) -> bool:
    """Whether a layer with this weight (O, I) gets our product."""
    return weight.dtype == torch.bfloat16 and native.has_tiles() and native.library() is not None and not _compiled()


def tile_linear(weight: Tensor) -> Callable[[Tensor, Any, Tensor | None], Tensor]:
    """`x W^T + bias` for this weight (O, I), of which it keeps a packed copy. x: (..., I), bias: (O,) -> (..., O)."""
    packed_weight, (outputs, inputs) = native.pack_tiles(weight), weight.shape

    # `packed_weight` is a name that packed_weights.py looks for. The layer's own weight is empty by now.
    def linear(x: Tensor, _: Any, bias: Tensor | None) -> Tensor:
        return native.tile_product(x.reshape(-1, inputs), packed_weight, outputs, bias).view(*x.shape[:-1], outputs)

    return linear


def _compiled() -> bool:
    """Whether vLLM is loading a model that it will compile. A compiler knows its own operators only."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.compilation_config.mode != CompilationMode.NONE
