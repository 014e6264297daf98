"""Where the cells of a mini-batch lie, and how they become the score of every candidate.

Shape suffixes: P probes, C cells, E examples, N candidates, T tokens of the longest candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_zo.objectives.base import EncodedExample, ScoringSequence


def flatten_sequences(examples: Sequence[EncodedExample]) -> list[ScoringSequence]:
    """The sequences of a mini-batch, example by example. Members and cells are numbered in this order."""
    return [sequence for example in examples for sequence in example.sequences]


def cell_offsets(examples: Sequence[EncodedExample]) -> list[int]:
    """The first cell of every flattened sequence, then the number of cells.

    Sequence i owns the cells from offsets[i] to offsets[i + 1] - 1. Two sequences with 2 and 3 cells give [0, 2, 5].
    """
    return list(accumulate((sequence.num_cells for sequence in flatten_sequences(examples)), initial=0))


def candidate_scores(cells_PC: Tensor, examples: Sequence[EncodedExample]) -> Tensor:
    """The score of every candidate: its only cell (kind "labels"), or the mean over its tokens (kind "logprobs").

    A sequence of kind "labels" holds one candidate per cell. A sequence of kind "logprobs" is one candidate.

    Args:
        cells_PC: (P, C) scores, C as `cell_offsets` counts them.
        examples: the mini-batch; N is the largest number of candidates among them.

    Returns:
        (P, E, N) float32 (float64 from float64 cells) on the device of the cells. It is -inf where an example has fewer
        than N candidates. A cell that is not finite reaches its own example only.
    """
    # At least float32: a central difference divides a difference of losses by 2 eps, and 16 bits would lose it.
    cells_PC = cells_PC.to(torch.promote_types(cells_PC.dtype, torch.float32))
    if all(sequence.kind == "labels" for sequence in flatten_sequences(examples)) and not _is_ragged(examples):
        # The usual case, where the cells are the scores in order: no index has to go to the device.
        return cells_PC.reshape(len(cells_PC), len(examples), -1)
    cells_PENT, length_EN = _padded(cells_PC, examples)
    return (cells_PENT.sum(-1) / length_EN).masked_fill(length_EN == 0, float("-inf"))


def candidate_logprobs(cells_PC: Tensor, examples: Sequence[EncodedExample]) -> Tensor:
    """The log-probability of every candidate (kind "logprobs"): the sum over its tokens.

    Returns:
        (P, E, N) float64 on the device of the cells: the sum of a long completion is so large that float32 would round
        the difference of two probes away. A cell that is not finite reaches its own example only.
    """
    return _padded(cells_PC.double(), examples)[0].sum(-1)


def _padded(cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
    """(P, E, N, T) cells of every candidate, zero behind its last, and (E, N) numbers of its cells."""
    spans = _candidate_spans(examples)
    longest = max(length for example in spans for _, length in example)
    most = max(len(example) for example in spans)
    padded = [[*example, *[(0, 0)] * (most - len(example))] for example in spans]
    spans_EN2 = torch.tensor(padded).to(cells_PC.device, non_blocking=True)
    start_EN1, length_EN1 = spans_EN2[..., :1], spans_EN2[..., 1:]
    token_T = torch.arange(longest, device=cells_PC.device)
    beyond_ENT = token_T >= length_EN1
    # Padding reads the first cell of its span, which is a valid index, and the mask drops it. `masked_fill` instead of
    # a product with 0, because 0 times a cell that is not finite is NaN.
    cell_ENT = torch.where(beyond_ENT, start_EN1, start_EN1 + token_T)
    cells_PENT = cells_PC[:, cell_ENT].masked_fill(beyond_ENT, 0.0)
    return cells_PENT, length_EN1.squeeze(-1)


def choice_loss(scores_PEN: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
    """The cross-entropy over the candidates of each example, and the best candidate.

    The loss is log(1 + sum_n exp(score_n - score_gold)) over the wrong candidates n. The difference of scores comes
    first, so that a confident example keeps a loss above zero. As logsumexp(scores) - score_gold it would round to 0,
    and both probes of a pair would lose their difference.

    Args:
        scores_PEN: (P, E, N) as `candidate_scores` gives them.

    Returns:
        (P, E) float32 nats, NaN where a score is not finite; and (P, E) int64 indices of the best candidates.
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
    # x - x is 0, or NaN for a score that is not finite. Without it an infinite gold score would give a loss of 0.
    spoiled_PE = (real_PEN - real_PEN).sum(-1)
    return F.softplus(wrong_PEN.logsumexp(-1)) + spoiled_PE, scores_PEN.argmax(-1)


def _is_ragged(examples: Sequence[EncodedExample]) -> bool:
    return len({example.num_candidates for example in examples}) > 1


def misses(cells_PC: Tensor, examples: Sequence[EncodedExample]) -> Tensor:
    """(P, E) int64: how many tokens of an example's only sequence (kind "logprobs") are not the likeliest there."""
    offsets = cell_offsets(examples)[:-1]
    counts = [len(example.sequences[0].label_ids) for example in examples]
    token = torch.cat([torch.arange(o, o + n) for o, n in zip(offsets, counts, strict=True)])
    # In a sequence of n labels, the likeliest token's cell is n cells behind that of the label (base.py).
    best = token + torch.tensor(counts).repeat_interleave(torch.tensor(counts))
    example = torch.arange(len(examples)).repeat_interleave(torch.tensor(counts))
    token, best, example = (index.to(cells_PC.device, non_blocking=True) for index in (token, best, example))
    # "Not at least as large" instead of "smaller": a comparison with NaN is false, and NaN must count as a miss.
    missed = (~(cells_PC[:, token] >= cells_PC[:, best])).long()
    zeros = torch.zeros(len(cells_PC), len(examples), dtype=torch.int64, device=cells_PC.device)
    return zeros.index_add(1, example, missed)


def _candidate_spans(examples: Sequence[EncodedExample]) -> list[list[tuple[int, int]]]:
    """(first cell, number of score cells) of every candidate of every example."""
    spans: list[list[tuple[int, int]]] = []
    cell = 0
    for example in examples:
        candidates = []
        for sequence in example.sequences:
            cells = len(sequence.label_ids)
            if sequence.kind == "labels":
                candidates += [(cell + i, 1) for i in range(cells)]
            else:
                candidates.append((cell, cells))
            # More than `cells` for kind "logprobs", whose second half (the best tokens) is no part of the score.
            cell += sequence.num_cells
        spans.append(candidates)
    return spans
