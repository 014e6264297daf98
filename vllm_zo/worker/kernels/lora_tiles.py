"""Which rows of a batch a program of the low-rank kernels works on: made on the host, used on the device.

Rows are sorted by the slot whose A they are multiplied with, then by their own slot. One order serves both kernels: a
tile of the shrink is up to ROWS neighbours with the same A, a tile of the expand up to ROWS neighbours with the same B.
Rows without an adapter are in no tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS = 32
"""Rows of a tile. Not tuned on a GPU: 441 rows make 14 tiles, and a tile of 16 would read A and B twice as often."""
FIELDS = 4


@dataclass(frozen=True)
class Plan:
    """Attributes:
    rows: (N,) int32, indices of the rows that have an adapter, in the order of the tiles.
    shrink, expand: (tiles, 4) int32: slot, first position in `rows`, number of rows, leading rank rows in use.
    """

    rows: np.ndarray
    shrink: np.ndarray
    expand: np.ndarray


def plan(slot_of_row: np.ndarray, owner: Sequence[int], used_rank: Sequence[int]) -> Plan:
    """Tiles of a batch.

    40 rows of slot 0 and 3 of slot 1, both with the A of slot 0, in 4 ranks: shrink (0, 0, 32, 4), (0, 32, 11, 4);
    expand (0, 0, 32, 4), (0, 32, 8, 4), (1, 40, 3, 4).

    Args:
        slot_of_row: (T,) slot of each row, -1 for none.
        owner: per slot, a slot that holds the same A; itself where it shares with nobody.
        used_rank: per slot, rank rows that can be non-zero.
    """
    owners, ranks = np.asarray(owner), np.asarray(used_rank)
    rows = np.flatnonzero(slot_of_row >= 0)
    rows = rows[np.lexsort((slot_of_row[rows], owners[slot_of_row[rows]]))]
    slots = slot_of_row[rows]
    return Plan(rows.astype(np.int32), _tiles(owners[slots], ranks), _tiles(slots, ranks))


def _tiles(slot_of_position: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Equal slots are neighbours."""
    slots, firsts, counts = np.unique(slot_of_position, return_index=True, return_counts=True)
    tiles = -(-counts // ROWS)
    within = np.arange(tiles.sum()) - np.repeat(tiles.cumsum() - tiles, tiles)
    slot, first, count = (np.repeat(values, tiles) for values in (slots, firsts, counts))
    lines = (slot, first + within * ROWS, np.minimum(count - within * ROWS, ROWS), ranks[slot])
    return np.stack(lines, axis=1).astype(np.int32)


def most_tiles(rows: int, slots: int) -> int:
    """A bound that does not depend on which rows have which slot, so that a CUDA graph launches it every time."""
    return -(-rows // ROWS) + slots


class DeviceTiles:
    """A plan at fixed addresses on the device, replaced outside of the CUDA graphs that read it."""

    def __init__(self, max_rows: int, slots: int, device: torch.device | str) -> None:
        most = most_tiles(max_rows, slots)
        self._size = FIELDS * most
        self._buffer = torch.zeros(2 * self._size + max_rows, dtype=torch.int32, device=device)
        self.shrink = self._buffer[: self._size].view(most, FIELDS)
        self.expand = self._buffer[self._size : 2 * self._size].view(most, FIELDS)
        self.rows = self._buffer[2 * self._size :]

    def update(self, plan: Plan) -> None:
        """One upload that the host does not wait for. Tiles beyond the plan's are zeros: no rows and no rank."""
        host = np.zeros(2 * self._size + len(plan.rows), np.int32)
        host[: plan.shrink.size] = plan.shrink.ravel()
        host[self._size : self._size + plan.expand.size] = plan.expand.ravel()
        host[2 * self._size :] = plan.rows
        upload(host, self._buffer)


def upload(host: np.ndarray, out: Tensor) -> None:
    """`out[:len(host)] = host`, from pinned memory: from other memory the copy would wait for the device."""
    staged = torch.empty(host.shape, dtype=out.dtype, pin_memory=out.device.type == "cuda")
    staged.copy_(torch.from_numpy(host))
    out[: len(host)].copy_(staged, non_blocking=True)
