"""How an accumulator goes into a weight: `W += U V^T`, with seeded stochastic rounding below float32. Pure torch, for
the CPU: on CUDA `worker/cuda/triton_fold.py` does the same.

A fold of 50 LoZO steps at learning rate 1e-7 is below half an ulp of most bfloat16 weights, so rounding to nearest
would lose it. Stochastic rounding is right in expectation. Its noise is a function of (key, module, element), so every
replay rounds alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_zo import noise

MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
"""Explicit mantissa bits; float32 has 23."""
_CHUNK_ELEMENTS = 1 << 18
"""Elements per pass of a fold: the float32 sum, its bits and the noise stay in a CPU's cache. Smaller passes cost more
calls; larger ones were not faster."""


def fold_into(
    weight_OI: Tensor,
    u_OR: Tensor,
    v_IR: Tensor | None,
    key: int,
    module: str,
    out: Tensor | None = None,
    *,
    first_element: int = 0,
    stride: int | None = None,
    rounding: Callable[..., Tensor] | None = None,
) -> Tensor:
    """(O, I) `weight + u v^T` in the weight's dtype: addition in float32, then seeded stochastic rounding.

    Args:
        weight_OI: (O, I) float32, bfloat16 or float16: a whole module, or a rank's part of it.
        u_OR, v_IR: float32 factors (O, R) and (I, R). Without v, `u_OR` is the whole change (O, I).
        key: 64-bit key of this fold. Equal keys give equal rounding.
        out: receives the result, and may be the weight itself. None stands for a new tensor.
        first_element, stride: where the part lies in the module: the number of its element (0, 0), and the inputs of
            the whole module (None: I). The rounding noise goes by an element's number in the whole module, so that
            every tensor-parallel size gives the same weights.
        rounding: takes what `stochastic_round` takes, and gives the same bits. None: `stochastic_round` itself.

    Raises:
        TypeError: the weight has another dtype.
    """
    if weight_OI.dtype == torch.float32:
        if v_IR is None:
            return torch.add(weight_OI, u_OR, out=out)
        return torch.addmm(weight_OI, u_OR, v_IR.T, out=out)
    if out is None:
        out = torch.empty_like(weight_OI)
    outs, ins = weight_OI.shape
    # Whole lines of the matrix: a part then has one product with V, and its elements follow each other in the noise.
    size = max(1, _CHUNK_ELEMENTS // max(1, ins))
    for first in range(0, outs, size):
        part = slice(first, first + size)
        # `float()` copies the part before `out`, which may be the weight, receives it.
        total = weight_OI[part].float()
        total = total.add_(u_OR[part]) if v_IR is None else total.addmm_(u_OR[part], v_IR.T)
        number = first_element + first * (ins if stride is None else stride)
        out[part] = (rounding or stochastic_round)(total, weight_OI.dtype, key, module, number, stride)
    return out


def stochastic_round(
    value: Tensor, dtype: torch.dtype, key: int, module: str, first_element: int = 0, stride: int | None = None
) -> Tensor:
    """Round float32 to `dtype`, up or down. The nearer of the two values is the likelier one, in proportion.

    The function adds a uniform integer below the kept bits to the bit pattern and truncates. That rounds away from zero
    with a probability of exactly the dropped fraction. Two kinds of values round to nearest instead: float16 subnormals
    (below 6e-5), whose dropped bits have no fixed place, and values beyond the largest finite number.

    Args:
        value: float32 of any shape: the elements `first_element`, `first_element + 1`, ... of the module. With a
            `stride`, a matrix: element (o, i) is the module's number `first_element + o * stride + i`.
        key: 64-bit key of the fold.

    Returns:
        A tensor of the shape of `value`, in `dtype`.

    Raises:
        TypeError: `dtype` is neither bfloat16 nor float16.
    """
    if dtype not in MANTISSA_BITS:
        raise TypeError(f"stochastic rounding to {dtype} is not defined; use float32, bfloat16 or float16")
    dropped_mask = (1 << (23 - MANTISSA_BITS[dtype])) - 1
    lines, length = (1, value.numel()) if stride is None else value.shape
    starts = (first_element + line * (stride or 0) for line in range(lines))
    ranges = noise.ElementRanges.of((module, start, start + length) for start in starts)
    bits = noise.uniform_int32(key, ranges, value.device).view(value.shape)
    # A float is sign and magnitude, so adding to its bits raises the magnitude for either sign. A carry out of the
    # mantissa raises the exponent, and gives the next representable value.
    bits.bitwise_and_(dropped_mask).add_(value.contiguous().view(torch.int32)).bitwise_and_(~dropped_mask)
    magnitude = value.abs()
    # False for NaN too, whose bit pattern must not carry over into another number.
    in_range = magnitude <= torch.finfo(dtype).max
    if dtype == torch.float16:
        in_range &= magnitude >= torch.finfo(dtype).smallest_normal
    return torch.where(in_range, bits.view(torch.float32), value).to(dtype)
