"""Writes factors into the slots of every module: by our compiled kernel, or with a copy of torch's for each module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_zo.worker.cpu import native
from vllm_zo.worker.slot_writers import Piece


class LoopWriter:
    """See `SlotWriter`. All modules are written in one call of torch.

    On a CPU making the views takes longer than copying the numbers, so the views are kept.

    Args:
        pieces: in the order of their offsets, which are multiples of the rank.
        rank: LoRA rank of the factors.
    """

    def __init__(self, pieces: Sequence[Piece], rank: int) -> None:
        self.pieces, self.rank = pieces, rank
        self._blocks: dict[tuple[int, int], list[Tensor]] = {}
        self._sizes: list[int] = []
        """How the flat vector splits, in features of `rank` numbers each: the part before a piece, which another
        tensor-parallel rank holds; the piece; the part before the next piece; and so on."""
        for piece in pieces:
            self._sizes += [piece.offset // rank - sum(self._sizes), piece.slots.shape[1]]
        self._native = native.pieces([piece.slots for piece in pieces], [piece.offset for piece in pieces])

    def write(self, flat: Tensor, slot: int, block: int, factor: float, rows: Tensor | None = None) -> None:
        """See `SlotWriter`."""
        if rows is not None:
            (piece,) = self.pieces
            columns = slice(block * self.rank, (block + 1) * self.rank)
            numbers = flat.view(-1, self.rank)[rows] * factor
            piece.slots[slot, rows, columns] = numbers.to(piece.slots.dtype)
            return
        if self._native is not None:
            ranks = range(block * self.rank, (block + 1) * self.rank)
            native.write_slots(flat.contiguous(), self._native, slot, ranks, factor, self.pieces[0].slots.dtype)
            return
        if factor != 1.0:
            flat = flat * factor
        if (slot, block) not in self._blocks:
            columns = slice(block * self.rank, (block + 1) * self.rank)
            self._blocks[slot, block] = [piece.slots[slot, :, columns] for piece in self.pieces]
        rows = flat.view(-1, self.rank)
        parts = rows.split([*self._sizes, len(rows) - sum(self._sizes)])
        # Private in torch. A call per module would take longer than the copies. Pieces are every second part.
        torch._foreach_copy_(self._blocks[slot, block], parts[1::2])
