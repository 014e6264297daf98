"""The table of a group's scores, which has a float32 cell for each score, and the functions that write cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_zo.objectives.base import EncodedExample, ScoringSequence
from vllm_zo.objectives.cells import cell_offsets, flatten_sequences
from vllm_zo.upload import upload


@dataclass
class LossTable:
    """The scores of a group.

    Attributes:
        examples: the group's mini-batch.
        sequences: of all examples, one after another.
        offsets: for each sequence, the first of its cells.
        cells_PC: (probes, cells) float32. A cell is NaN until it is scored: a cell that is never written makes the
            group's losses non-finite, and cannot pass for a score of zero.
    """

    examples: tuple[EncodedExample, ...]
    sequences: list[ScoringSequence]
    offsets: list[int]
    cells_PC: Tensor

    @classmethod
    def empty(cls, examples: tuple[EncodedExample, ...], probes: int, device: torch.device) -> LossTable:
        *offsets, total = cell_offsets(examples)
        cells = torch.full((probes, total), torch.nan, dtype=torch.float32, device=device)
        return cls(examples, flatten_sequences(examples), offsets, cells)


@dataclass(slots=True)  # a step makes some thousand of them
class Entry:
    """A label to score at a hidden row, and the cells that receive the result.

    Attributes:
        row: number of the row among the hidden states of this engine step.
        label: token id.
        table: holds the cells.
        cell: receives the label's score; its number in the flattened table.
        best_cell: receives the largest log-probability of any token at the row; a sequence of kind "labels" has no such
            cell, and nothing writes it.
        slot: slot of the member's adapter, among all of vLLM's, if the adapter changes the LM head; else None.
    """

    row: int
    label: int
    table: LossTable
    cell: int
    best_cell: int
    slot: int | None


Cell = tuple[LossTable, int]
"""A table, and the number of a cell in the flattened table."""


def by_table(cells: Iterable[Cell]) -> list[tuple[LossTable, list[int], list[int]]]:
    """Each table, the positions in `cells` of its cells, and their numbers. Usually there is one table."""
    # By id, because a LossTable has no hash.
    grouped: dict[int, tuple[LossTable, list[int], list[int]]] = {}
    for position, (table, cell) in enumerate(cells):
        if (group := grouped.get(id(table))) is None:
            group = grouped[id(table)] = table, [], []
        group[1].append(position)
        group[2].append(cell)
    return list(grouped.values())


def write_cells(values: Tensor, cells: Sequence[Cell]) -> None:
    """Write `values[i]` into `cells[i]`. values: (len(cells),) float32."""
    tables = by_table(cells)
    for table, positions, places in tables:
        chosen = values if len(tables) == 1 else values[upload(positions, values.device)]
        table.cells_PC.view(-1)[upload(places, values.device)] = chosen
