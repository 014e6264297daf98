"""Which rows of a batch each program of the low-rank kernels works on. The host makes the plan, the device reads it.

Rows are sorted by the slot whose A they are multiplied with, then by their own slot. One order serves both kernels: a
tile of the shrink is up to ROWS neighbours with the same A, a tile of the expand up to ROWS neighbours with the same B.
Rows without an adapter are in no tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_zo.upload import upload_into

ROWS = 32
"""Rows of a tile. Not tuned on a GPU: 441 rows make 14 tiles, and a tile of 16 would read A and B twice as often."""
FIELDS = 4
"""Numbers that describe a tile: see `Plan`."""


@dataclass(frozen=True)
class Plan:
    """The tiles of a batch.

    Attributes:
        rows: (N,) int32, the rows that have an adapter, in the order of the tiles.
        shrink, expand: (tiles, 4) int32: slot, first position in `rows`, number of rows, leading ranks in use.
    """

    rows: np.ndarray
    shrink: np.ndarray
    expand: np.ndarray


def plan(slot_of_row: np.ndarray, owner: Sequence[int], used_rank: Sequence[int]) -> Plan:
    """Make the tiles of a batch.

    Example: 40 rows of slot 0 and 3 of slot 1, both with the A of slot 0 and 4 ranks: shrink (0, 0, 32, 4), (0, 32, 11,
    4); expand (0, 0, 32, 4), (0, 32, 8, 4), (1, 40, 3, 4).

    Args:
        slot_of_row: (T,) slot of each row, -1 for none.
        owner: for each slot, a slot that holds the same A; the slot itself if no other does.
        used_rank: for each slot, how many of its leading ranks can be non-zero.
    """
    owners, ranks = np.asarray(owner), np.asarray(used_rank)
    rows = np.flatnonzero(slot_of_row >= 0)
    rows = rows[np.lexsort((slot_of_row[rows], owners[slot_of_row[rows]]))]
    slots = slot_of_row[rows]
    return Plan(rows.astype(np.int32), _tiles(owners[slots], ranks), _tiles(slots, ranks))


def _tiles(slot_of_position: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """(tiles, 4) tiles of rows that are sorted by slot.

    Args:
        slot_of_position: (N,) slots; equal ones are neighbours.
        ranks: for each slot, the leading ranks in use.
    """
    slots, firsts, counts = np.unique(slot_of_position, return_index=True, return_counts=True)
    tiles = -(-counts // ROWS)
    within = np.arange(tiles.sum()) - np.repeat(tiles.cumsum() - tiles, tiles)
    slot, first, count = (np.repeat(values, tiles) for values in (slots, firsts, counts))
    lines = (slot, first + within * ROWS, np.minimum(count - within * ROWS, ROWS), ranks[slot])
    return np.stack(lines, axis=1).astype(np.int32)


def most_tiles(rows: int, slots: int) -> int:
    """A bound on the number of tiles. It does not depend on the rows' slots, because a CUDA graph launches the same
    grid every time. Each slot has at most one tile that is not full."""
    return -(-rows // ROWS) + slots


class DeviceTiles:
    """A plan at fixed addresses on the device. CUDA graphs read it; a new plan is written between their launches."""

    def __init__(self, max_rows: int, slots: int, device: torch.device | str) -> None:
        most = most_tiles(max_rows, slots)
        self._size = FIELDS * most
        # One buffer, so that a plan takes one upload.
        self._buffer = torch.zeros(2 * self._size + max_rows, dtype=torch.int32, device=device)
        self.shrink = self._buffer[: self._size].view(most, FIELDS)
        self.expand = self._buffer[self._size : 2 * self._size].view(most, FIELDS)
        self.rows = self._buffer[2 * self._size :]

    def update(self, plan: Plan) -> None:
        """Write a plan in one upload, for which the host does not wait. Tiles beyond the plan's are zeros: the kernels
        leave a tile without ranks at once."""
        host = np.zeros(2 * self._size + len(plan.rows), np.int32)
        host[: plan.shrink.size] = plan.shrink.ravel()
        host[self._size : self._size + plan.expand.size] = plan.expand.ravel()
        host[2 * self._size :] = plan.rows
        upload_into(self._buffer, host)
