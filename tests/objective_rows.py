"""Rows, cells and naive losses for the tests of objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_zo.objectives import (
    Classification,
    EncodedExample,
    ScoringSequence,
    flatten_sequences,
)

TEMPLATE = "{sentence} It was"


OPTIONS = [" terrible", " great"]


RECORD = {"sentence": "a film of great charm", "label": 1}


ROUNDING = {"rtol": 2e-6, "atol": 2e-6}
"""float32 against float64: cells of a few nats, sums of at most 5 of them, one softmax; a few ulps of 2.4e-7 each."""


def classification(**settings: Any) -> Classification:
    return Classification(TEMPLATE, settings.pop("options", OPTIONS), **settings)


def labels_row(candidates: int) -> ScoringSequence:
    return ScoringSequence((5, 6, 7), (2,), tuple(range(candidates)), "labels")


def logprobs_row(tokens: int) -> ScoringSequence:
    return ScoringSequence(tuple(range(tokens + 3)), tuple(range(2, 2 + tokens)), tuple(range(tokens)), "logprobs")


def random_examples(candidates: int, single: Sequence[bool]) -> list[EncodedExample]:
    """Examples of both kinds, with options of 1 to 5 tokens and every candidate right some time."""
    generator = torch.Generator().manual_seed(candidates)
    examples = []
    for i, one_row in enumerate(single):
        lengths = torch.randint(1, 6, (candidates,), generator=generator).tolist()
        rows = (labels_row(candidates),) if one_row else tuple(logprobs_row(n) for n in lengths)
        examples.append(EncodedExample(rows, gold=i % candidates))
    return examples


def naive_scores(cells: list[float], examples: Sequence[EncodedExample]) -> list[list[float]]:
    """Scores of the candidates of every example: pop cells from the front of the table."""
    cells = list(cells)
    scores = []
    for example in examples:
        of_example = []
        for row in example.sequences:
            taken, cells = cells[: len(row.label_ids)], cells[row.num_cells :]
            of_example += taken if row.kind == "labels" else [sum(taken) / len(taken)]
        scores.append(of_example)
    assert not cells
    return scores


def naive_classification(cells: list[float], examples: Sequence[EncodedExample]) -> tuple[list[float], list[int]]:
    losses, predictions = [], []
    for scores, example in zip(naive_scores(cells, examples), examples, strict=True):
        scores_N = torch.tensor(scores, dtype=torch.float64)
        losses.append(-scores_N.log_softmax(0)[example.gold].item())
        predictions.append(int(scores_N.argmax()))
    return losses, predictions


@torch.no_grad()
def score_rows(model: Any, examples: Sequence[EncodedExample], dtype: torch.dtype = torch.float64) -> Tensor:
    """(1, C) cells by the definition in `objectives/base.py`, one forward pass a row."""
    cells: list[Tensor] = []
    for row in flatten_sequences(examples):
        logits = model.to(dtype)(torch.tensor([row.token_ids])).logits[0, list(row.positions)]
        if row.kind == "labels":
            cells += logits[0, list(row.label_ids)]
        else:
            cells += [line.log_softmax(-1)[t] for line, t in zip(logits, row.label_ids, strict=True)]
            cells += [line.log_softmax(-1).max() for line in logits]
    return torch.stack(cells)[None]
