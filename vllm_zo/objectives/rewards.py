"""Rewards by name: functions that score completions. The package's own compare completions with known answers.

Each of them takes `completions` and a column `answers`, which has for each completion one answer or a list of equally
good ones. It scores against the answer that fits best: `Reward("{question} Answer:", reward="token_f1")`.

Another package declares its reward in the entry point group "vllm_zo.rewards"; a script calls `REWARDS.register`. A
client of a server may name no other functions.

Source: the official SQuAD evaluation (Rajpurkar et al. 2016), as MeZO uses it for its non-differentiable objective.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from inspect import isfunction
from typing import Any

from vllm_zo.registry import Registry

RewardFunction = Callable[..., Sequence[float]]
"""`reward(completions, **columns) -> one number per completion`, as in TRL."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
Answers = Sequence[str | Sequence[str]]


def normalise(text: str) -> str:
    """The text in lower case, without punctuation, articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(completions: Sequence[str], answers: Answers, **columns: Any) -> list[float]:
    """1 if the normalised completion equals one of the normalised answers, else 0."""
    return _best(completions, answers, lambda text, answer: float(normalise(text) == normalise(answer)))


def contains(completions: Sequence[str], answers: Answers, **columns: Any) -> list[float]:
    """1 if one of the normalised answers occurs in the normalised completion, else 0."""
    return _best(completions, answers, lambda text, answer: float(normalise(answer) in normalise(text)))


def token_f1(completions: Sequence[str], answers: Answers, **columns: Any) -> list[float]:
    """F1 of the words that completion and answer have in common, for the answer that fits best."""
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


REWARDS: Registry[RewardFunction] = Registry(
    "reward", isfunction, "a function reward(completions, **columns)", (exact_match, contains, token_f1)
)
