"""Games for a chat model: an instruction, and a reward that has no gradient. For rewards_vs_grpo.py.

`reviews` asks for the right answer in exactly one form. `praise` asks for the rest of a review, and a classifier of
reviews grades it: a smooth reward of an open text, as of a reward model.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

OPENING, LONG_ENOUGH = 5, 10
"""Words of a review that are shown, and the words of one that has more to say."""
Grade = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Completions and the answers of their rows -> rewards from 0 to 1."""


@dataclass(frozen=True)
class Game:
    """What a model is asked, and what its answers earn.

    Args:
        rows: the folder of the data -> rows with `question` and `answer`.
        instruction: a template of the columns of a row.
        grader: the folder of the data -> what rewards.
        max_tokens: the most of a completion.
    """

    rows: Callable[[Path], Iterable[dict[str, Any]]]
    instruction: str
    grader: Callable[[Path], Grade]
    max_tokens: int


def labelled(data: Path) -> Iterator[tuple[str, int]]:
    """The training rows of SST-2: a review, or a part of one, and 1 for praise."""
    for line in (data / "sst2" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield row["sentence"].strip(), row["label"]


def reviews(data: Path) -> Iterator[dict[str, Any]]:
    for text, label in labelled(data):
        yield {"question": text, "answer": f"This review is {('negative', 'positive')[label]}."}


def openings(data: Path) -> Iterator[dict[str, Any]]:
    """The first words of each review that goes on behind them, once each."""
    seen: set[str] = set()
    for text, _ in labelled(data):
        words = text.split()
        opening = " ".join(words[:OPENING])
        if len(words) >= LONG_ENOUGH and opening not in seen:
            seen.add(opening)
            yield {"question": opening, "answer": ""}


def exact(completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 for the right answer and nothing else, white space around it aside."""
    return [float(text.strip() == right) for text, right in zip(completions, answers, strict=True)]


class Praise:
    """The probability that a text is praise, by naive Bayes over its words; .5 for a text without a known word.

    Args:
        examples: texts, and 1 for praise.
    """

    def __init__(self, examples: Iterable[tuple[str, int]]) -> None:
        counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for text, label in examples:
            counts[label].update(words_of(text))
        vocabulary = counts[0].keys() | counts[1].keys()
        totals = [of_class.total() + len(vocabulary) for of_class in counts]
        self._log_odds = {
            word: math.log((counts[1][word] + 1) / totals[1]) - math.log((counts[0][word] + 1) / totals[0])
            for word in vocabulary
        }

    def __call__(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [self._probability(text) for text in completions]

    def _probability(self, text: str) -> float:
        """Every word counts once: to write one word again and again earns nothing."""
        odds = sum(self._log_odds.get(word, 0.0) for word in dict.fromkeys(words_of(text)))
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, odds))))


def words_of(text: str) -> list[str]:
    return [word.strip(".,:;!?\"'()-") for word in text.lower().split()]


GAMES = {
    "reviews": Game(
        reviews,
        "Is this review positive or negative? {question}\n"
        'Reply "This review is positive." or "This review is negative."',
        lambda data: exact,
        max_tokens=8,
    ),
    "praise": Game(
        openings,
        "Write how this review of a film goes on: {question}",
        lambda data: Praise(islice(labelled(data), 10_000, None)),
        max_tokens=16,
    ),
}
