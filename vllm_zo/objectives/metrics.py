"""What an evaluation reports in addition to the mean loss, from numbers that the engine already has."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllm_zo.objectives.base import EncodedExample


def choice_metrics(predictions: Sequence[int], examples: Sequence[EncodedExample]) -> dict[str, float]:
    """Accuracy, and macro F1: 2 tp / (2 tp + fp + fn), averaged over the classes that occur.

    "macro_f1" is there only if all examples have the same number of candidates, because only then are they classes.
    """
    golds = [example.gold for example in examples]
    pairs = list(zip(predictions, golds, strict=True))
    out = {"accuracy": sum(p == g for p, g in pairs) / len(pairs)}
    if len({example.num_candidates for example in examples}) == 1:
        classes = sorted({*golds, *predictions})
        scores = [2 * sum(p == g == c for p, g in pairs) / sum((p == c) + (g == c) for p, g in pairs) for c in classes]
        out["macro_f1"] = sum(scores) / len(scores)
    return out


def completion_metrics(
    losses: Sequence[float], predictions: Sequence[int], examples: Sequence[EncodedExample]
) -> dict[str, float]:
    """The metrics of completions that the model reads instead of writing them.

    accuracy        share of examples whose tokens are all the model's first choice: greedy decoding would write them
    token_accuracy  share of tokens that are the model's first choice
    perplexity      exp of the mean loss per token over all tokens; infinite if it overflows
    """
    tokens = [len(example.sequences[0].label_ids) for example in examples]
    # Weighted by tokens: `losses` are means per example, and perplexity is defined over all tokens.
    nats = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    return {
        "accuracy": sum(p == 0 for p in predictions) / len(predictions),
        "token_accuracy": 1.0 - sum(predictions) / sum(tokens),
        # exp(709.8) is the largest float64, and beyond it `math.exp` raises. NaN gives infinity here too.
        "perplexity": math.exp(nats) if nats < 700.0 else math.inf,
    }
