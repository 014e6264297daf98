"""Where a job's factors lie in vLLM's stacked LoRA tensors, and how a flat vector gets there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from vllm_zo.methods.layout import FactorLayout
from vllm_zo.worker.modules import Target


@dataclass(frozen=True)
class Piece:
    """Where one module's factor goes.

    Attributes:
        pages: (slots, rows, columns) view of the module's stacked tensor, of any strides: a row is an output (of B) or
            an input (of A), a column is a rank.
        offset: index in the flat vector of the factor's first element that belongs to this rank.
    """

    pages: Tensor
    offset: int


class PageWriter(Protocol):
    def write(self, flat: Tensor, slot: int, block: int, factor: float) -> None:
        """`pages[slot][row, block * r + j] = factor * flat[offset + row * r + j]`, for every module.

        Args:
            flat: (N,) float32.
        """


class LoopWriter:
    """Module by module, in one call: on a CPU making the views costs more than copying, so those of pages are kept.

    Pieces are in the order of their offsets, which are multiples of the rank.
    """

    def __init__(self, pieces: Sequence[Piece], rank: int) -> None:
        self.pieces, self.rank = pieces, rank
        self._blocks: dict[tuple[int, int], list[Tensor]] = {}
        self._sizes: list[int] = []
        """Rows of the flat vector: those before a piece that are another rank's, those of the piece, and so on."""
        for piece in pieces:
            self._sizes += [piece.offset // rank - sum(self._sizes), piece.pages.shape[1]]

    def write(self, flat: Tensor, slot: int, block: int, factor: float) -> None:
        if factor != 1.0:
            flat = flat * factor
        if (slot, block) not in self._blocks:
            columns = slice(block * self.rank, (block + 1) * self.rank)
            self._blocks[slot, block] = [piece.pages[slot, :, columns] for piece in self.pieces]
        rows = flat.view(-1, self.rank)
        parts = rows.split([*self._sizes, len(rows) - sum(self._sizes)])
        torch._foreach_copy_(self._blocks[slot, block], parts[1::2])


@dataclass(frozen=True)
class JobPages:
    """Writers of a job's A (from flat V) and B (from flat U)."""

    a: PageWriter
    b: PageWriter

    @classmethod
    def of(cls, layout: FactorLayout, targets: tuple[Target, ...], *, one_launch: bool) -> JobPages:
        """Args: one_launch: by a Triton kernel, all modules together."""
        r = layout.rank
        firsts_v = accumulate(layout.v_ranges.counts, initial=0)
        firsts_u = accumulate(layout.u_ranges.counts, initial=0)
        a = [Piece(t.a_pages, first + t.in_slice.start * r) for t, first in zip(targets, firsts_v, strict=False)]
        b = [Piece(t.b_pages, first + t.out_slice.start * r) for t, first in zip(targets, firsts_u, strict=False)]
        if not one_launch:
            return cls(LoopWriter(a, r), LoopWriter(b, r))
        from vllm_zo.worker.kernels.triton_pages import OneLaunchWriter  # triton is there on GPU machines only

        return cls(OneLaunchWriter(a, r), OneLaunchWriter(b, r))


def wants_one_launch(device: torch.device) -> bool:
    """A 13B model has 240 linear modules: on a GPU as many launches cost more than everything else a slot needs."""
    return device.type == "cuda"
