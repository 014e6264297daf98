"""A fold on a GPU in one launch a module: `W += U V^T` in place, with the rounding bits drawn in the kernel.

`methods/fold.py` says what a fold is, and is the road of every other device. There a pass of 16 million elements takes
about ten launches, each of which reads or writes four bytes an element: the float32 sum, the noise, its masks and the
rounded copy. Here a program reads a tile of the weight, adds, rounds and writes it back: two bytes an element each way,
no memory of its own, no table. What is left is the noise, some 25 integer instructions an element.

An element's sum goes over the ranks in their order, whatever the tile, so a part of a module on a tensor-parallel rank
is folded bit for bit as the whole. The rounding bits are those of the plain road. Its float32 sum may differ by the
order of a matrix product, and then one element in some thousands rounds to the other neighbour.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_zo.methods.fold import MANTISSA_BITS
from vllm_zo.noise.keys import module_id
from vllm_zo.noise.ranges import WORDS
from vllm_zo.noise.triton import signed, words

LINES, COLUMNS = 16, 256
"""Of the tile of a program. Not tuned on a GPU: 4,096 elements are 32 for each of 128 threads."""


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
) -> Tensor:
    """(O, I) `weight + u v^T`: what `methods.fold.fold_into` gives, up to the order of a float32 sum.

    Args:
        weight_OI: (O, I) float32, bfloat16 or float16; lines may be strided.
        u_OR, v_IR: float32 factors (O, R) and (I, R), of any strides. Without v, `u_OR` is the whole change (O, I).
        key, module, out, first_element, stride: see `methods.fold.fold_into`.

    Raises:
        TypeError: the weight has another dtype.
    """
    dtype = weight_OI.dtype
    if dtype != torch.float32 and dtype not in MANTISSA_BITS:
        raise TypeError(f"stochastic rounding to {dtype} is not defined; use float32, bfloat16 or float16")
    if out is None:
        out = torch.empty_like(weight_OI)
    outs, ins = weight_OI.shape
    if not outs or not ins:
        return out
    assert weight_OI.stride(1) == out.stride(1) == 1
    stride = ins if stride is None else stride
    v = u_OR if v_IR is None else v_IR
    limits = torch.finfo(dtype)
    with torch.cuda.device_of(weight_OI):
        _fold[(triton.cdiv(outs, LINES), triton.cdiv(ins, COLUMNS))](
            out, weight_OI, u_OR, v, outs, ins, u_OR.shape[1],
            out.stride(0), weight_OI.stride(0), *u_OR.stride(), *v.stride(),
            signed(key), signed(module_id(module)), first_element, stride,
            DENSE=v_IR is None, DROPPED=23 - MANTISSA_BITS[dtype] if dtype in MANTISSA_BITS else 0,
            SMALLEST=limits.smallest_normal if dtype == torch.float16 else 0.0, LARGEST=limits.max,
            ALIGNED=first_element % WORDS == 0 and stride % WORDS == 0, LINES=LINES, COLUMNS=COLUMNS,
        )  # fmt: skip
    return out


# Triton would compile again for a number of 1 or of a multiple of 16. Here that pays for the lines of the weight only.
@triton.jit(do_not_specialize=["outs", "rank", "u_line", "v_line", "key", "high", "first", "stride"])
def _fold(  # type: ignore[no-untyped-def]
    out, weight, u, v, outs, ins, rank,
    out_line, weight_line, u_line, u_column, v_line, v_column, key, high, first, stride,
    DENSE: tl.constexpr, DROPPED: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
    ALIGNED: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # int64: the elements of a large module can pass 2**31.
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (line < outs)[:, None] & (column < ins)[None, :]
    if DENSE:
        change = tl.load(u + line[:, None] * u_line + column[None, :] * u_column, mask=there, other=0.0)
    else:
        change = tl.zeros((LINES, COLUMNS), dtype=tl.float32)
        for r in range(0, rank):
            u_part = tl.load(u + line * u_line + r * u_column, mask=line < outs, other=0.0)
            v_part = tl.load(v + column * v_line + r * v_column, mask=column < ins, other=0.0)
            change += u_part[:, None] * v_part[None, :]
    old = tl.load(weight + line[:, None] * weight_line + column[None, :], mask=there, other=0.0)
    total = old.to(tl.float32) + change
    if DROPPED:
        number = first + line * stride  # of a line's first element in the module
        if ALIGNED:
            counter = tl.program_id(1) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
            w0, w1, w2, w3 = words((number >> 2)[:, None] + counter[None, :], high, key)
            noise = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        else:  # a counter's elements lie in two tiles or lines: each element makes all four words, and takes its own
            element = number[:, None] + column[None, :]
            w0, w1, w2, w3 = words(element >> 2, high, key)
            word = element & 3
            noise = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
        total = _round(total, noise, DROPPED, SMALLEST, LARGEST)
    tl.store(out + line[:, None] * out_line + column[None, :], total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _round(total, noise, DROPPED: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """See `methods.fold.stochastic_round`."""
    mask: tl.constexpr = (1 << DROPPED) - 1
    bits = tl.add(total.to(tl.uint32, bitcast=True), noise & mask, sanitize_overflow=False) >> DROPPED << DROPPED
    magnitude = tl.abs(total)
    # False for NaN too, whose bit pattern must not carry over into another number.
    in_range = (magnitude <= LARGEST) & (magnitude >= SMALLEST)
    return tl.where(in_range, bits.to(tl.float32, bitcast=True), total)
