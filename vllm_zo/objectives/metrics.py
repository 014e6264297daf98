"""What an evaluation reports beside the mean loss, from numbers the engine has anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllm_zo.objectives.base import EncodedExample


def choice_metrics(predictions: Sequence[int], examples: Sequence[EncodedExample]) -> dict[str, float]:
    """accuracy, and macro_f1: the mean over the classes that occur of 2 tp / (2 tp + fp + fn).

    Macro F1 is given where all examples have the same number of candidates, because only then are they classes.
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
    """Of a teacher-forced completion.

    accuracy        share of examples whose every token is the model's first choice: greedy decoding would produce it
    token_accuracy  share of tokens that are
    perplexity      exp of the mean loss per token, over all tokens (infinite where it overflows)
    """
    tokens = [len(example.rows[0].label_ids) for example in examples]
    nats = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    return {
        "accuracy": sum(p == 0 for p in predictions) / len(predictions),
        "token_accuracy": 1.0 - sum(predictions) / sum(tokens),
        "perplexity": math.exp(nats) if nats < 700.0 else math.inf,
    }
