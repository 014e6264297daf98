"""Linear layers on CPUs where vLLM's packed product is not the fastest.

16-bit weights on a CPU without 16-bit matrix instructions: the product is computed in float32, and the weight stays in
16 bits. Such a CPU emulates a bfloat16 product one multiplication at a time, 3 to 8 times slower than float32. Widening
a weight costs one pass over it; for a batch of some tokens the faster product saves many times that. No second copy of
the weights is kept.

float32 weights on a CPU without AVX-512: many rows are multiplied with the plain weight, few with oneDNN's packed one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_TOKENS = 16
"""With fewer tokens, reading the weight in 16 bits is cheaper than widening it (measured at 768 to 3,072 features)."""
BLOCK_ELEMENTS = 1 << 21
"""Weight elements that are widened at a time: 8 MiB in float32, which fits into the cache that the cores share."""

PLAIN_ROWS = 128
"""From this number of rows on torch's product (MKL) is at least as fast as oneDNN's. Measured at 256 to 3,072 features:
equal at 128 rows, 5 to 9 % faster at 256. With fewer rows oneDNN is up to a third faster."""
KEPT_BYTES = 384 << 20
"""Budget for weights that are kept both packed and plain. The layers that are loaded first use it up: it covers
OPT-125M, and 1/13 of OPT-1.3B. It is chosen so that a job needs at most 10 % more memory than serving."""
_bytes_left = 0
"""The part of the budget that is left; 0 until a training worker asks for plain weights. It is a global, because vLLM's
`dispatch_cpu_unquantized_gemm` does not know the worker. A worker process loads one model."""

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


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` with an unpacked weight: (..., I), (O, I), (O,) -> (..., O). A weight that changes every few steps
    does not repay the time of packing it."""
    return F.linear(x, weight, bias)


def keep_plain_weights() -> None:
    """Let layers that are loaded from now on keep plain weights, up to the budget. A training worker calls this before
    it loads its model; serving rarely has as many rows in a step as training."""
    global _bytes_left
    _bytes_left = KEPT_BYTES


def is_kept_plain(layer: Any) -> bool:
    """Whether a layer keeps its (O, I) weight beside the packed one. The first call for a layer decides, so that a
    weight that is packed again is counted once."""
    global _bytes_left
    if not hasattr(layer, "zo_kept_plain"):  # kept on the layer, which lives as long as the answer holds
        weight = layer.weight
        # MKL was not measured on other CPUs than x86, so they stay with vLLM's choice.
        fits = weight.dtype == torch.float32 and weight.nbytes <= _bytes_left
        layer.zo_kept_plain = fits and not has_avx512()
        if layer.zo_kept_plain:
            _bytes_left -= weight.nbytes
    return bool(layer.zo_kept_plain)


def plain_for_many_rows(packed: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Callable[..., Tensor]:
    """A product for many rows with the plain weight. It leaves few rows to `packed`, vLLM's choice for the layer."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # `packed` stays a variable of this closure: `packed_weights.PACKED` knows it by name.
        many = x.numel() >= PLAIN_ROWS * x.shape[-1]
        return F.linear(x, weight, bias) if many else packed(x, weight, bias)

    return linear


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
