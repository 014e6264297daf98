"""The low-rank product of a batch on a GPU: `y[row] += scale * x[row] A_slot^T B_slot^T`, in two launches per layer.

    shrink    x A^T in float32, as partial sums of SPAN inputs; a tile is rows that share A, whatever their B
    expand    adds the partial sums in order, multiplies by B^T and adds to y; a tile is rows of one slot

Both launches cover all slices of a layer. Ranks that a slot does not use are not read. A program finds its tile in
tables at fixed addresses (`lora_tiles.py`), and the grid depends on shapes only, so a CUDA graph stays valid for every
batch.

vLLM's own kernels differ in three ways. They split a shrink along its inputs and sum the parts by atomics, in an order
that changes from run to run, into a buffer that a third launch zeroes; here a row's result depends neither on the order
of programs nor on other rows. Their grid has a plane for every slot, so that with 2 K + 1 slots most programs end at
once. And they read every adapter at its padded rank, in 16 bits only.

There are two launches, because 441 rows are only 14 tiles. If one program shrank and expanded a tile, 14 programs would
run on a card with 132 multiprocessors, each over all 5,120 to 20,480 inputs and all outputs. Several programs for a
tile, one for each part of the outputs, would each repeat the shrink. Split at the small intermediate (rows x rank,
float32) both halves fill the card: for OPT-13B's qkv 14 x 5 x 3 programs shrink and 14 x 40 x 3 expand. Memory bounds
both halves: x is read once for each slice, y is read and written once.

Sizes of tiles are a first guess: nothing here has run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_zo.worker.cuda.lora_tiles import ROWS, most_tiles

SPAN = 1024
"""Inputs of a partial sum. It is a constant, so that the order of a row's sum does not depend on the batch."""
INPUTS, OUTPUTS = 128, 128
"""Columns of x that a program reads at a time, and columns of y that a program writes."""
MOST_RANKS = 64
"""Ranks that a program handles at a time; further ranks follow in turns."""
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_tables: dict[tuple[int, ...], Tensor] = {}
"""Tables of `_table` by their content. It is a global, because a custom op of torch has no object to keep them on."""


def lora_linear(
    y: Tensor,
    x: Tensor,
    a_stacked: Sequence[Tensor],
    b_stacked: Sequence[Tensor],
    rows: Tensor,
    shrink_tiles: Tensor,
    expand_tiles: Tensor,
    no_lora: Tensor,
    scale: float,
    add_inputs: bool,
) -> None:
    """`y[:, slice i] += scale * x A_i^T B_i^T` in place, with the slot of each row.

    Args:
        y, x: (T, sum of O_i) and (T, I); rows may be strided.
        a_stacked, b_stacked: for each slice contiguous (slots, 1, R, I) and (slots, 1, O_i, R), in the type of x.
        rows, shrink_tiles, expand_tiles: of `lora_tiles.DeviceTiles`.
        no_lora: (1,) bool on the host: whether no row has an adapter. It is a tensor, because torch.compile makes a
            constant of a Python value.
        scale: of the product.
        add_inputs: False: y is overwritten, and is zero for rows without an adapter.
    """
    if not add_inputs:
        y.zero_()
    tokens, inputs = x.shape
    slices, (slots, _, rank, _) = len(a_stacked), a_stacked[0].shape
    # Also for a batch without adapters: the first call uploads the table, which must not happen inside a graph capture.
    table = _table(a_stacked, b_stacked)
    if not tokens or no_lora.item():
        return
    assert x.dtype == a_stacked[0].dtype == b_stacked[0].dtype and x.stride(1) == y.stride(1) == 1
    tiles, spans = most_tiles(tokens, slots), triton.cdiv(inputs, SPAN)
    ranks = min(MOST_RANKS, max(16, triton.next_power_of_2(rank)))  # tl.dot needs at least 16
    turns = triton.cdiv(rank, ranks)
    partial = torch.empty(slices, spans, tokens, rank, dtype=torch.float32, device=x.device)
    widest = max(b.shape[2] for b in b_stacked)
    kind = _TYPES[x.dtype]
    with torch.cuda.device_of(x):
        _shrink[(tiles, spans, slices * turns)](
            x, table, rows, shrink_tiles, partial, tokens, inputs, x.stride(0), scale,
            RANK=rank, RANKS=ranks, TURNS=turns, TYPE=kind, ROWS=ROWS, INPUTS=INPUTS, SPAN=SPAN,
        )  # fmt: skip
        _expand[(tiles, triton.cdiv(widest, OUTPUTS), slices)](
            y, table, rows, expand_tiles, partial, tokens, spans, y.stride(0),
            RANK=rank, RANKS=ranks, TYPE=kind, ROWS=ROWS, OUTPUTS=OUTPUTS,
        )  # fmt: skip


def _table(a_stacked: Sequence[Tensor], b_stacked: Sequence[Tensor]) -> Tensor:
    """(slices, 4) int64 on the device: addresses of A and B, first output column, number of outputs. Tables are kept;
    vLLM allocates the stacked tensors once."""
    columns, lines = 0, []
    for a, b in zip(a_stacked, b_stacked, strict=True):
        assert a.is_contiguous() and b.is_contiguous()
        lines.append((a.data_ptr(), b.data_ptr(), columns, b.shape[2]))
        columns += b.shape[2]
    key = tuple(number for line in lines for number in line)
    if key not in _tables:
        _tables[key] = torch.tensor(lines, dtype=torch.int64).to(a_stacked[0].device)
    return _tables[key]


@triton.jit
def _rows_of(tile, rows, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The positions of a tile, whether each belongs to the tile, and their rows."""
    position = tl.load(tile + 1) + tl.arange(0, ROWS)
    there = tl.arange(0, ROWS) < tl.load(tile + 2)
    return position, there, tl.load(rows + position, mask=there, other=0).to(tl.int64)


@triton.jit(do_not_specialize=["tokens", "scale"])
def _shrink(  # type: ignore[no-untyped-def]
    x, table, rows, tiles, partial, tokens, inputs, x_stride, scale,
    RANK: tl.constexpr, RANKS: tl.constexpr, TURNS: tl.constexpr, TYPE: tl.constexpr,
    ROWS: tl.constexpr, INPUTS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    tile = tiles + 4 * tl.program_id(0)
    # int64: slot * rank * inputs can pass 2**31. `used` is 0 beyond the last tile.
    slot, used = tl.load(tile).to(tl.int64), tl.load(tile + 3)
    span, of_slice, turn = tl.program_id(1), tl.program_id(2) // TURNS, tl.program_id(2) % TURNS
    if turn * RANKS >= used:
        return
    position, there, row = _rows_of(tile, rows, ROWS)
    rank = turn * RANKS + tl.arange(0, RANKS)
    a = tl.multiple_of(tl.load(table + 4 * of_slice), 16).to(tl.pointer_type(TYPE)) + slot * RANK * inputs
    total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for step in range(0, tl.minimum(SPAN, inputs - span * SPAN), INPUTS):
        column = span * SPAN + step + tl.arange(0, INPUTS)
        inside = column < inputs
        x_part = tl.load(
            x + row[:, None] * x_stride + column[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        a_part = tl.load(
            a + rank[:, None] * inputs + column[None, :], mask=(rank < used)[:, None] & inside[None, :], other=0.0
        )
        total = tl.dot(x_part, tl.trans(a_part), total, input_precision="ieee")
    spans = tl.num_programs(1)
    place = ((of_slice * spans + span) * tokens + position).to(tl.int64)[:, None] * RANK + rank[None, :]
    tl.store(partial + place, total * scale, mask=there[:, None] & (rank < used)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _expand(  # type: ignore[no-untyped-def]
    y, table, rows, tiles, partial, tokens, spans, y_stride,
    RANK: tl.constexpr, RANKS: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    tile, line = tiles + 4 * tl.program_id(0), table + 4 * tl.program_id(2)
    slot, used = tl.load(tile).to(tl.int64), tl.load(tile + 3)
    first, outputs, of_slice = tl.load(line + 2), tl.load(line + 3), tl.program_id(2)
    if used == 0 or tl.program_id(1) * OUTPUTS >= outputs:
        return
    position, there, row = _rows_of(tile, rows, ROWS)
    column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = column < outputs
    b = tl.multiple_of(tl.load(line + 1), 16).to(tl.pointer_type(TYPE)) + slot * outputs * RANK
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for turn in range(0, used, RANKS):
        rank = turn + tl.arange(0, RANKS)
        shrunk = tl.zeros((ROWS, RANKS), dtype=tl.float32)
        # In this order, always: the sum of a row must not depend on which shrink ended first.
        for span in range(0, spans):
            place = ((of_slice * spans + span) * tokens + position).to(tl.int64)[:, None] * RANK + rank[None, :]
            shrunk += tl.load(partial + place, mask=there[:, None] & (rank < used)[None, :], other=0.0)
        b_part = tl.load(
            b + column[:, None] * RANK + rank[None, :], mask=inside[:, None] & (rank < used)[None, :], other=0.0
        )
        total = tl.dot(shrunk.to(TYPE), tl.trans(b_part), total, input_precision="ieee")
    target = y + row[:, None] * y_stride + (first + column)[None, :]
    wanted = there[:, None] & inside[None, :]
    total += tl.load(target, mask=wanted, other=0.0).to(tl.float32)
    tl.store(target, total.to(y.dtype.element_ty), mask=wanted)


def _fake(*arguments: object) -> None:
    """What torch.compile runs in place of `lora_linear`. The op returns nothing, and its schema says that y changes."""


_library = torch.library.Library("vllm_zo", "FRAGMENT")
_library.define("lora_linear" + torch.library.infer_schema(lora_linear, mutates_args=["y"]))
for _key in ("CUDA", "CPU"):  # the tests run the kernels on a CPU, in Triton's interpreter
    _library.impl("lora_linear", lora_linear, _key)
torch.library.register_fake("vllm_zo::lora_linear", _fake, lib=_library)
