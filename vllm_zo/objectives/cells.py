"""Where the cells of a mini-batch lie, and the score of every candidate from them.

Shape suffixes: P probes, C cells, E examples, N candidates, T tokens of the longest candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_zo.objectives.base import EncodedExample, ScoringRow


def flatten_rows(examples: Sequence[EncodedExample]) -> list[ScoringRow]:
    """The rows of a mini-batch, example by example: the order in which members and cells are numbered."""
    return [row for example in examples for row in example.rows]


def row_offsets(examples: Sequence[EncodedExample]) -> list[int]:
    """First cell of every flattened row, then the number of cells: row i owns cells [offsets[i], offsets[i + 1]).

    Two rows with 2 and 3 cells give [0, 2, 5].
    """
    return list(accumulate((row.num_cells for row in flatten_rows(examples)), initial=0))


def candidate_scores(cells_PC: Tensor, examples: Sequence[EncodedExample]) -> Tensor:
    """Score of every candidate: its only cell (kind "labels"), or the mean of its tokens' (kind "logprobs").

    A row of kind "labels" holds one candidate per cell; a row of kind "logprobs" is one candidate.

    Args:
        cells_PC: (P, C) scores, C as `row_offsets` counts them.
        examples: the mini-batch; N is the largest number of candidates among them.

    Returns:
        (P, E, N) float32 (float64 from float64 cells) on the device of the cells; -inf where an example has fewer than
        N candidates. A cell that is not finite reaches its own example only.
    """
    cells_PC = cells_PC.to(torch.promote_types(cells_PC.dtype, torch.float32))
    spans = _candidate_spans(examples)
    if all(row.kind == "labels" for row in flatten_rows(examples)) and not _is_ragged(examples):
        return cells_PC.reshape(len(cells_PC), len(examples), -1)  # the usual case: cells are scores, in order
    longest = max(length for example in spans for _, length in example)
    most = max(len(example) for example in spans)
    padded = [[*example, *[(0, 0)] * (most - len(example))] for example in spans]
    spans_EN2 = torch.tensor(padded).to(cells_PC.device, non_blocking=True)
    start_EN1, length_EN1 = spans_EN2[..., :1], spans_EN2[..., 1:]
    token_T = torch.arange(longest, device=cells_PC.device)
    beyond_ENT = token_T >= length_EN1
    cell_ENT = torch.where(beyond_ENT, start_EN1, start_EN1 + token_T)
    cells_PENT = cells_PC[:, cell_ENT].masked_fill(beyond_ENT, 0.0)
    length_EN = length_EN1.squeeze(-1)
    return (cells_PENT.sum(-1) / length_EN).masked_fill(length_EN == 0, float("-inf"))


def choice_loss(scores_PEN: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
    """Cross-entropy over each example's candidates, and the best of them.

    The loss is taken as log(1 + sum_n exp(score_n - score_gold)) over the wrong candidates n: the difference comes
    first, so a confident example keeps a loss above zero instead of losing it to rounding.

    Args:
        scores_PEN: as `candidate_scores` gives them.

    Returns:
        (P, E) float32 nats, nan where a score is not finite; and (P, E) int64 candidates.
    """
    gold_E1 = torch.tensor([[example.gold] for example in examples]).to(scores_PEN.device, non_blocking=True)
    gold_PE1 = gold_E1.expand(len(scores_PEN), -1, -1)
    margin_PEN = scores_PEN - scores_PEN.gather(-1, gold_PE1)
    wrong_PEN = margin_PEN.scatter(-1, gold_PE1, float("-inf"))
    real_PEN = scores_PEN
    if _is_ragged(examples):
        counts_E1 = torch.tensor([[e.num_candidates] for e in examples]).to(scores_PEN.device, non_blocking=True)
        absent_EN = torch.arange(scores_PEN.shape[-1], device=scores_PEN.device) >= counts_E1
        real_PEN = scores_PEN.masked_fill(absent_EN, 0.0)
        wrong_PEN = wrong_PEN.masked_fill(absent_EN, float("-inf"))
    spoiled_PE = (real_PEN - real_PEN).sum(-1)  # 0, or nan: an infinite gold score would look like a loss of 0
    return F.softplus(wrong_PEN.logsumexp(-1)) + spoiled_PE, scores_PEN.argmax(-1)


def _is_ragged(examples: Sequence[EncodedExample]) -> bool:
    return len({example.num_candidates for example in examples}) > 1


def misses(cells_PC: Tensor, examples: Sequence[EncodedExample]) -> Tensor:
    """(P, E) int64: tokens of each example's only row (kind "logprobs") that are not the model's first choice."""
    offsets = row_offsets(examples)[:-1]
    counts = [len(example.rows[0].label_ids) for example in examples]
    token = torch.cat([torch.arange(o, o + n) for o, n in zip(offsets, counts, strict=True)])
    best = token + torch.tensor(counts).repeat_interleave(torch.tensor(counts))
    example = torch.arange(len(examples)).repeat_interleave(torch.tensor(counts))
    token, best, example = (index.to(cells_PC.device, non_blocking=True) for index in (token, best, example))
    missed = (~(cells_PC[:, token] >= cells_PC[:, best])).long()  # nan is a miss
    zeros = torch.zeros(len(cells_PC), len(examples), dtype=torch.int64, device=cells_PC.device)
    return zeros.index_add(1, example, missed)


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
            cell += row.num_cells
        spans.append(candidates)
    return spans
