"""Rewards that come with the package: metrics of answers, which have no gradient.

Each takes `completions` and a column `answers` (one answer, or a list of equally good ones, per completion) and scores
against the best of them: `Reward("{question} Answer:", reward="vllm_zo.rewards:token_f1")`.

Source: the official SQuAD evaluation (Rajpurkar et al. 2016), as MeZO uses it for its non-differentiable objective.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
Answers = Sequence[str | Sequence[str]]


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(completions: Sequence[str], answers: Answers, **columns: Any) -> list[float]:
    """1 where the normalised completion is one of the normalised answers."""
    return _best(completions, answers, lambda text, answer: float(normalise(text) == normalise(answer)))


def contains(completions: Sequence[str], answers: Answers, **columns: Any) -> list[float]:
    """1 where one of the normalised answers occurs in the normalised completion."""
    return _best(completions, answers, lambda text, answer: float(normalise(answer) in normalise(text)))


def token_f1(completions: Sequence[str], answers: Answers, **columns: Any) -> list[float]:
    """F1 of the words in common, against the answer that fits best."""
    return _best(completions, answers, _f1)


def _f1(text: str, answer: str) -> float:
    """2 PR / (P + R) over the multisets of words; two empty texts agree."""
    ours, theirs = normalise(text).split(), normalise(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2.0 * common / (len(ours) + len(theirs))


def _best(completions: Sequence[str], answers: Answers, score: Callable[[str, str], float]) -> list[float]:
    rewards = []
    for text, accepted in zip(completions, answers, strict=True):
        accepted = [accepted] if isinstance(accepted, str) else accepted
        rewards.append(max(score(text, answer) for answer in accepted))
    return rewards
