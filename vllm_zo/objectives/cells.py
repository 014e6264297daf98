"""Where the cells of a mini-batch lie, and the score of every candidate from them.

Shape suffixes: P probes, C cells, E examples, N candidates, T tokens of the longest candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vllm_zo.objectives.base import EncodedExample, ScoringRow


def flatten_rows(examples: Sequence[EncodedExample]) -> list[ScoringRow]:
    """The rows of a mini-batch, example by example: the order in which members and cells are numbered."""
    return [row for example in examples for row in example.rows]


def row_offsets(examples: Sequence[EncodedExample]) -> list[int]:
    """First cell of every flattened row, then the number of cells: row i owns cells [offsets[i], offsets[i + 1]).

    Two rows with 2 and 3 cells give [0, 2, 5]. A row has one cell per label id, whatever its kind.
    """
    return list(accumulate((len(row.label_ids) for row in flatten_rows(examples)), initial=0))


def candidate_scores(cells_PC: Tensor, examples: Sequence[EncodedExample]) -> Tensor:
    """Score of every candidate: its only cell (kind "labels"), or the mean of its cells (kind "logprobs").

    A row of kind "labels" holds one candidate per cell; a row of kind "logprobs" is one candidate.

    Args:
        cells_PC: (P, C) scores, C as `row_offsets` counts them.
        examples: the mini-batch; all have the same number of candidates.

    Returns:
        (P, E, N) float32 (float64 from float64 cells) on the device of the cells. A cell that is not finite reaches its
        own example only.
    """
    cells_PC = cells_PC.to(torch.promote_types(cells_PC.dtype, torch.float32))
    spans = _candidate_spans(examples)
    longest = max(length for example in spans for _, length in example)
    if longest == 1:  # single-token options, the usual case: cells are scores, in order
        return cells_PC.reshape(len(cells_PC), len(examples), -1)
    spans_EN2 = torch.tensor(spans).to(cells_PC.device, non_blocking=True)
    start_EN1, length_EN1 = spans_EN2[..., :1], spans_EN2[..., 1:]
    token_T = torch.arange(longest, device=cells_PC.device)
    beyond_ENT = token_T >= length_EN1
    cell_ENT = torch.where(beyond_ENT, start_EN1, start_EN1 + token_T)
    cells_PENT = cells_PC[:, cell_ENT].masked_fill(beyond_ENT, 0.0)
    return cells_PENT.sum(-1) / length_EN1.squeeze(-1)


def _candidate_spans(examples: Sequence[EncodedExample]) -> list[list[tuple[int, int]]]:
    """(first cell, number of cells) of every candidate of every example."""
    spans: list[list[tuple[int, int]]] = []
    cell = 0
    for example in examples:
        candidates = []
        for row in example.rows:
            cells = len(row.label_ids)
            if row.kind == "labels":
                candidates += [(cell + i, 1) for i in range(cells)]
            else:
                candidates.append((cell, cells))
            cell += cells
        spans.append(candidates)
    return spans
