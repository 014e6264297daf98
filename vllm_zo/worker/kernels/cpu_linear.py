"""Linear layers on CPUs where vLLM's packed product is not the fastest.

16 bits, on a CPU without 16-bit matrix instructions: the product in float32, the weight kept in 16 bits. Such a CPU
emulates a bfloat16 product one multiplication at a time, 3 to 8 times slower than float32. Widening a weight costs one
pass over it, which a batch of some tokens pays back many times; no second copy of the weights is kept.

float32, on a CPU without AVX-512: many rows are multiplied with the plain weight, few with oneDNN's packed one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_TOKENS = 16
"""Below this, reading the weight once in 16 bits is cheaper than widening it (measured at 768 to 3,072 features)."""
BLOCK_ELEMENTS = 1 << 21
"""Weight elements widened at a time: 8 MiB, which stays in a shared cache."""

PLAIN_ROWS = 128
"""From here on torch's product (MKL) takes as long as oneDNN's or less, at 256 to 3,072 features: the same at 128 rows,
5 to 9 % less at 256. Below, down to two thirds of its time are enough for oneDNN."""
KEPT_BYTES = 384 << 20
"""Of weights that an engine keeps twice, first layer first: all of OPT-125M's, a thirteenth of OPT-1.3B's. A job of
OPT-125M takes as much memory as serving the same prompts does, and may take a tenth more."""
_bytes_left = 0

_NATIVE = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "amx_fp16", "fp16")}
"""What torch.cpu.get_capabilities() calls the instructions, on x86 (the first two) and ARM."""

_scratch: list[Tensor] = []


@functools.cache
def is_emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions to multiply matrices of `dtype`."""
    capabilities = torch.cpu.get_capabilities()
    return dtype in _NATIVE and not any(capabilities.get(name, False) for name in _NATIVE[dtype])


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` with the weight as it is, not packed: a weight that changes every few steps is not worth it."""
    return F.linear(x, weight, bias)


def keep_plain_weights() -> None:
    """For a training worker, before its model is loaded: only a step has that many rows all the time."""
    global _bytes_left
    _bytes_left = KEPT_BYTES


def is_kept_plain(layer: Any) -> bool:
    """Whether a layer with an (O, I) weight keeps it beside the packed one. Decided at the first call for a layer: a
    weight that is packed again counts once."""
    global _bytes_left
    if not hasattr(layer, "zo_kept_plain"):
        weight = layer.weight
        wide = torch.cpu.get_capabilities().get("avx512_f", True)  # not x86: not measured
        layer.zo_kept_plain = weight.dtype == torch.float32 and weight.nbytes <= _bytes_left and not wide
        if layer.zo_kept_plain:
            _bytes_left -= weight.nbytes
    return bool(layer.zo_kept_plain)


def plain_for_many_rows(packed: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Callable[..., Tensor]:
    """A product that leaves few rows to `packed`, vLLM's choice for the layer."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        many = x.numel() >= PLAIN_ROWS * x.shape[-1]
        return F.linear(x, weight, bias) if many else packed(x, weight, bias)

    return linear


def widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` in float32, rounded once to x's dtype. x: (..., I), weight: (O, I), bias: (O,) -> (..., O)."""
    tokens = x.numel() // x.shape[-1]
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
    """Scratch kept between calls: fresh memory would cost a page fault for every 4 KiB. One thread runs the model."""
    if not _scratch or _scratch[0].numel() < elements:
        with torch.inference_mode(False):  # one made inside could be written to inside only
            _scratch[:] = [torch.empty(max(elements, BLOCK_ELEMENTS), dtype=torch.float32)]
    return _scratch[0][:elements]
