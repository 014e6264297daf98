"""A flat vector of factors into the stacked LoRA tensors of every module, in one launch instead of one a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_zo.worker.pages import Piece

BLOCK = 1024
"""Elements per program."""
FIELDS = tl.constexpr(7)
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class OneLaunchWriter:
    """Knows the place of every module; made once for a job. All pages must be of one dtype and on one device."""

    def __init__(self, pieces: Sequence[Piece], rank: int) -> None:
        self.rank = rank
        self.pages = [piece.pages for piece in pieces]  # keeps the addresses valid
        self.table = torch.tensor(_programs(pieces, rank), dtype=torch.int64).to(self.pages[0].device)

    def write(self, flat: Tensor, slot: int, block: int, factor: float) -> None:
        """See `vllm_zo.worker.pages.PageWriter`."""
        with torch.cuda.device_of(flat):
            _scatter[(len(self.table),)](
                flat, self.table, slot, block * self.rank, factor,
                RANK=self.rank, BLOCK=BLOCK, TYPE=_TYPES[self.pages[0].dtype],
            )  # fmt: skip


def _programs(pieces: Sequence[Piece], rank: int) -> list[tuple[int, ...]]:
    """One line a program: address, strides of slot, row and column, offset in `flat`, first and last element.

    A factor of 1,500 elements takes two programs: elements 0 to 1024, and 1024 to 1500.
    """
    lines = []
    for piece in pieces:
        count = piece.pages.shape[1] * rank
        for first in range(0, count, BLOCK):
            stop = min(first + BLOCK, count)
            lines.append((piece.pages.data_ptr(), *piece.pages.stride(), piece.offset, first, stop))
    return lines


@triton.jit(do_not_specialize=["slot", "column", "factor"])
def _scatter(flat, table, slot, column, factor, RANK: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    line = table + FIELDS * tl.program_id(0)
    pages = tl.load(line).to(tl.pointer_type(TYPE))
    slot_stride, row_stride, column_stride = tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    offset, first, stop = tl.load(line + 4), tl.load(line + 5), tl.load(line + 6)
    element = first + tl.arange(0, BLOCK)
    inside = element < stop
    value = tl.load(flat + offset + element, mask=inside) * factor
    place = slot * slot_stride + (element // RANK) * row_stride + (column + element % RANK) * column_stride
    tl.store(pages + place, value.to(TYPE), mask=inside)
