"""`noise` on a GPU: one launch makes all pieces. The numbers are those of the CPU up to float rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_zo.noise.ranges import ElementRanges
from vllm_zo.upload import upload

BLOCK = 256
"""Counters of a program: 1,024 elements."""
U1_STEP = tl.constexpr(2.0**-31)
ANGLE_STEP = tl.constexpr(math.pi * 2.0**-31)


def fill(key: int, ranges: ElementRanges, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(total,) standard normals if `dtype` is float32, or the integers of `noise.uniform_int32` if it is int32."""
    out = torch.empty(ranges.total, dtype=dtype, device=device)
    if ranges.total:
        table = _table_on(device, ranges)
        with torch.cuda.device_of(out):
            _fill[(len(table),)](out, table, signed(key), BLOCK=BLOCK, GAUSSIAN=dtype == torch.float32)
    return out


def add(theta_N: Tensor, keys: Sequence[int], weights_K: Tensor, factor: float, ranges: ElementRanges) -> Tensor:
    """See `noise.add_normals`. For any K, theta is read once and the result is written once; no noise is stored."""
    out = torch.empty_like(theta_N)
    if ranges.total:
        device = theta_N.device
        table = _table_on(device, ranges)
        on_device = upload([signed(key) for key in keys], device)
        with torch.cuda.device_of(out):
            _add[(len(table),)](
                out, theta_N.contiguous(), table, on_device, weights_K.contiguous(), factor, len(keys), BLOCK=BLOCK
            )
    return out


def _table_on(device: torch.device, ranges: ElementRanges) -> Tensor:
    if device not in ranges.device_tables:
        ranges.device_tables[device] = launch_table(ranges).to(device)
    return ranges.device_tables[device]


def signed(key: int) -> int:
    """The key as a signed 64-bit integer, because Triton compiles a kernel again for an argument of another type."""
    return key - (1 << 64) if key >> 63 else key


def launch_table(ranges: ElementRanges) -> Tensor:
    """What each program does, (programs, 5) int64: first counter, module id, start and stop of the piece, and the index
    of an element in the flat vector minus its index in the module.

    A piece of 3,000 elements from element 6, placed at 100, takes three programs (counters 1-256, 257-512, 513-768):
    (1, id, 6, 3006, 94), (257, id, 6, 3006, 94), (513, id, 6, 3006, 94).
    """
    bounds = np.array([(start, stop) for _, start, stop in ranges.ranges], np.int64).reshape(-1, 2)
    counts = bounds[:, 1] - bounds[:, 0]
    shift = counts.cumsum() - counts - bounds[:, 0]
    programs = -(-ranges.blocks.count // BLOCK)
    within = np.arange(programs.sum()) - np.repeat(programs.cumsum() - programs, programs)
    first, high = ranges.blocks.first.view(np.int64), ranges.blocks.high.view(np.int64)
    table = np.stack((first, high, bounds[:, 0], bounds[:, 1], shift), axis=1).repeat(programs, axis=0)
    table[:, 0] += within * BLOCK
    return torch.from_numpy(table)


# Triton would compile a kernel again for an argument of 1 or of a multiple of 16, unless told otherwise.
@triton.jit(do_not_specialize=["key"])
def _fill(out, table, key, BLOCK: tl.constexpr, GAUSSIAN: tl.constexpr):  # type: ignore[no-untyped-def]
    row = table + 5 * tl.program_id(0)
    place, inside = _elements(row, BLOCK)
    tl.store(out + place, _values(row, key, BLOCK, GAUSSIAN), mask=inside)


@triton.jit(do_not_specialize=["factor", "count"])
def _add(out, theta, table, keys, weights, factor, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = table + 5 * tl.program_id(0)
    place, inside = _elements(row, BLOCK)
    total = tl.load(theta + place, mask=inside, other=0.0)
    for k in range(0, count):
        total += _values(row, tl.load(keys + k), BLOCK, True) * (tl.load(weights + k) * factor)
    tl.store(out + place, total, mask=inside)


@triton.jit
def _elements(row, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The places of a program's elements in the flat vector, and whether each belongs to the piece."""
    first, start, stop, shift = tl.load(row), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    element = 4 * first + tl.arange(0, 4 * BLOCK)
    return element + shift, (element >= start) & (element < stop)


@triton.jit
def _values(row, key, BLOCK: tl.constexpr, GAUSSIAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The noise of a program's elements, in their order. `row` is the program's line of the launch table."""
    counter = tl.load(row) + tl.arange(0, BLOCK)
    v0, v1, v2, v3 = words(counter, tl.load(row + 1), key)
    if GAUSSIAN:
        v0, v1 = _box_muller(v0, v1)
        v2, v3 = _box_muller(v2, v3)
    else:
        v0, v1 = v0.to(tl.int32, bitcast=True), v1.to(tl.int32, bitcast=True)
        v2, v3 = v2.to(tl.int32, bitcast=True), v3.to(tl.int32, bitcast=True)
    # The inner calls give v0 v2 v0 v2 ... and v1 v3 v1 v3 ...; the outer one gives v0 v1 v2 v3 for each counter.
    return tl.interleave(tl.interleave(v0, v2), tl.interleave(v1, v3))


@triton.jit
def words(counter, high, key):  # type: ignore[no-untyped-def]
    """The four uint32 words of each counter. counter: int64 low halves, of any shape; high: the module's id."""
    high = tl.zeros_like(counter) + high
    low0, low1 = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32 & 0xFFFFFFFF).to(tl.uint32)
    high0, high1 = (high & 0xFFFFFFFF).to(tl.uint32), (high >> 32 & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(key, low0, low1, high0, high1)


@triton.jit
def _box_muller(first, second):  # type: ignore[no-untyped-def]
    """The formula is in the docstring of `vllm_zo.noise`."""
    u1 = tl.maximum(tl.abs(first.to(tl.int32, bitcast=True).to(tl.float32)), 0.25) * U1_STEP
    radius = tl.sqrt(-2.0 * tl.log(u1))
    angle = second.to(tl.int32, bitcast=True).to(tl.float32) * ANGLE_STEP
    return radius * tl.cos(angle), radius * tl.sin(angle)
