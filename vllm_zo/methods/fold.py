"""Writing an accumulator into a weight: `W += U V^T` with seeded stochastic rounding below float32. Pure torch.

A fold of 50 LoZO steps at learning rate 1e-7 is below half an ulp of most bf16 weights: rounding to nearest would lose
it. Stochastic rounding is right in expectation, and its noise is a function of (key, module, element), so every shard
and every replay rounds alike (ALGORITHMS: fp32 where it matters).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_zo import noise

_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Elements folded at a time. On a CPU the float32 sum, its bits and the noise then stay in cache, and no device needs a
float32 copy of a large matrix. Smaller chunks cost more in calls, larger ones gain nothing."""


def change_of(u: Tensor, v_IR: Tensor | None) -> Tensor:
    """(O, I) `u v^T`; `u` itself where there is no v."""
    return u if v_IR is None else u @ v_IR.T


def fold_into(
    weight_OI: Tensor, u_OR: Tensor, v_IR: Tensor | None, key: int, module: str, out: Tensor | None = None
) -> Tensor:
    """`weight + u v^T` in the weight's dtype: addition in float32, then seeded stochastic rounding.

    Args:
        weight_OI: (O, I) float32, bfloat16 or float16; the *whole* module (rounding noise counts its elements from 0).
        u_OR, v_IR: float32 factors; without v, `u_OR` is the whole change (O, I).
        key: 64-bit key of this fold; equal keys, equal rounding.
        out: where the result goes; may be the weight itself.
    """
    if weight_OI.dtype == torch.float32:
        if v_IR is None:
            return torch.add(weight_OI, u_OR, out=out)
        return torch.addmm(weight_OI, u_OR, v_IR.T, out=out)
    if out is None:
        out = torch.empty_like(weight_OI)
    outs, ins = weight_OI.shape
    rows = max(1, _CHUNK_ELEMENTS.get(weight_OI.device.type, 1 << 24) // max(1, ins))
    for first in range(0, outs, rows):
        part = slice(first, first + rows)
        total = weight_OI[part].float()
        total = total.add_(u_OR[part]) if v_IR is None else total.addmm_(u_OR[part], v_IR.T)
        out[part] = stochastic_round(total, weight_OI.dtype, key, module, first_element=first * ins)
    return out


def stochastic_round(value: Tensor, dtype: torch.dtype, key: int, module: str, first_element: int = 0) -> Tensor:
    """Round float32 to `dtype`, up or down with probability proportional to the distance.

    Works on the bit pattern: adding a uniform integer below the dropped bits and truncating rounds up with exactly the
    dropped fraction's probability. Two kinds round to nearest instead: float16 subnormals (below 6e-5), because their
    dropped bits are not at a fixed place, and what lies beyond the largest finite number.

    Args:
        value: float32, elements `first_element`, `first_element + 1`, ... of the module.
    """
    if dtype not in _MANTISSA_BITS:
        raise TypeError(f"stochastic rounding to {dtype} is not defined; use float32, bfloat16 or float16")
    dropped_mask = (1 << (23 - _MANTISSA_BITS[dtype])) - 1
    ranges = noise.ElementRanges.of([(module, first_element, first_element + value.numel())])
    bits = noise.uniform_int32(key, ranges, value.device).view(value.shape)
    bits.bitwise_and_(dropped_mask).add_(value.contiguous().view(torch.int32)).bitwise_and_(~dropped_mask)
    magnitude = value.abs()
    in_range = magnitude <= torch.finfo(dtype).max  # false for NaN
    if dtype == torch.float16:
        in_range &= magnitude >= torch.finfo(dtype).smallest_normal
    return torch.where(in_range, bits.view(torch.float32), value).to(dtype)
