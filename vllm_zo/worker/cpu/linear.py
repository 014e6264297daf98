"""Linear layers with 16-bit weights on CPUs without 16-bit matrix instructions.

The product is computed in float32, and the weight stays in 16 bits. Such a CPU emulates a bfloat16 product one
multiplication at a time, 3 to 8 times slower than float32. Widening a weight costs one pass over it; for a batch of
some tokens the faster product saves many times that. No second copy of the weights is kept.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_TOKENS = 16
"""With fewer tokens, reading the weight in 16 bits is cheaper than widening it (measured at 768 to 3,072 features)."""
BLOCK_ELEMENTS = 1 << 21
"""Weight elements that are widened at a time: 8 MiB in float32, which fits into the cache that the cores share."""

_NATIVE = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "amx_fp16", "fp16")}
"""Names of the matrix instructions in torch.cpu.get_capabilities(), on x86 (avx512, amx) and ARM (the last)."""

_scratch: list[Tensor] = []
"""Empty, or holds the buffer of `_buffer`."""


@functools.cache
def is_emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU emulates products of matrices of `dtype`, because it has no instructions for them."""
    capabilities = torch.cpu.get_capabilities()
    return dtype in _NATIVE and not any(capabilities.get(name, False) for name in _NATIVE[dtype])


def has_avx512() -> bool:
    """Whether this CPU has AVX-512. True on other CPUs than x86, which report no such capability: what is done without
    it is not for them."""
    return bool(torch.cpu.get_capabilities().get("avx512_f", True))


def widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` in float32, rounded once to x's dtype. x: (..., I), weight: (O, I), bias: (O,) -> (..., O)."""
    tokens = x.numel() // x.shape[-1]
    # A compiled graph must not hold the scratch buffer, because `_buffer` may replace it later.
    if tokens < MIN_TOKENS or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    outputs, inputs = weight.shape
    wide = x.reshape(tokens, inputs).float()
    y = x.new_empty(tokens, outputs)
    rows = max(1, BLOCK_ELEMENTS // inputs)
    for start in range(0, outputs, rows):
        block = weight[start : start + rows]
        widened = _buffer(block.numel()).view_as(block).copy_(block)
        part = None if bias is None else bias[start : start + rows].float()
        y[:, start : start + rows] = F.linear(wide, widened, part)
    return y.view(*x.shape[:-1], outputs)


def _buffer(elements: int) -> Tensor:
    """(elements,) float32 scratch that is kept between calls: fresh memory would cost a page fault for every 4 KiB. It
    needs no lock, because one thread runs the model."""
    if not _scratch or _scratch[0].numel() < elements:
        # A tensor made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            _scratch[:] = [torch.empty(max(elements, BLOCK_ELEMENTS), dtype=torch.float32)]
    return _scratch[0][:elements]
