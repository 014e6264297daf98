"""Writes a flat vector of factors into the stacked LoRA tensors of all modules, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_zo.worker.slot_writers import Piece

BLOCK = 1024
"""Elements per program."""
FIELDS = tl.constexpr(7)
"""Numbers that describe a program's work: see `_programs`."""
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class OneLaunchWriter:
    """See `SlotWriter`. It is made once for a job, and keeps a table with the place of every module.

    Args:
        pieces: slots of one dtype, on one device.
        rank: LoRA rank of the factors.
    """

    def __init__(self, pieces: Sequence[Piece], rank: int) -> None:
        self.rank = rank
        self.slots = [piece.slots for piece in pieces]  # the table has their addresses, which must stay valid
        self.table = torch.tensor(_programs(pieces, rank), dtype=torch.int64).to(self.slots[0].device)

    def write(self, flat: Tensor, slot: int, block: int, factor: float, rows: Tensor | None = None) -> None:
        """See `SlotWriter`."""
        with torch.cuda.device_of(flat):
            _scatter[(len(self.table),)](
                flat, self.table, slot, block * self.rank, factor,
                RANK=self.rank, BLOCK=BLOCK, TYPE=_TYPES[self.slots[0].dtype],
            )  # fmt: skip


def _programs(pieces: Sequence[Piece], rank: int) -> list[tuple[int, ...]]:
    """A line for each program: address, strides of slot, feature and rank, offset in `flat`, first element, end.

    A factor of 1,500 elements takes two programs: elements 0 to 1024, and 1024 to 1500, ends not included.
    """
    lines = []
    for piece in pieces:
        count = piece.slots.shape[1] * rank
        for first in range(0, count, BLOCK):
            stop = min(first + BLOCK, count)
            lines.append((piece.slots.data_ptr(), *piece.slots.stride(), piece.offset, first, stop))
    return lines


# Triton would compile again for a slot or column of 1, or of a multiple of 16, unless told otherwise.
@triton.jit(do_not_specialize=["slot", "column", "factor"])
def _scatter(flat, table, slot, column, factor, RANK: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    line = table + FIELDS * tl.program_id(0)
    slots = tl.load(line).to(tl.pointer_type(TYPE))
    slot_stride, row_stride, column_stride = tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    offset, first, stop = tl.load(line + 4), tl.load(line + 5), tl.load(line + 6)
    element = first + tl.arange(0, BLOCK)
    inside = element < stop
    value = tl.load(flat + offset + element, mask=inside) * factor
    place = slot * slot_stride + (element // RANK) * row_stride + (column + element % RANK) * column_stride
    tl.store(slots + place, value.to(TYPE), mask=inside)
