"""A grader made of graders: a formula combines their rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_zo.objectives.graders.base import Grader, GraderResult
from vllm_zo.objectives.graders.formula import Formula


@dataclass(frozen=True)
class MultiGrader:
    """If one of its graders fails, the whole fails. The result still has the rewards of the others."""

    name: str
    graders: Mapping[str, Grader]
    formula: Formula

    @property
    def item_fields(self) -> frozenset[str]:
        return frozenset().union(*(grader.item_fields for grader in self.graders.values()))

    def __call__(self, sample_text: str, item: Mapping[str, Any]) -> GraderResult:
        results = {key: grader(sample_text, item) for key, grader in self.graders.items()}
        rewards = {key: result.reward for key, result in results.items()}
        errors = {flag: f"{key}: {detail}" for key, r in results.items() for flag, detail in r.errors.items()}
        if errors:
            return GraderResult(0.0, rewards, errors)
        try:
            reward = self.formula(rewards)
        except (ArithmeticError, ValueError, TypeError) as error:  # 1 / 0, sqrt(-1), (-8) ^ 0.5
            return GraderResult(0.0, rewards, {"formula_parse_error": f"{self.formula.source!r}: {error}"})
        if not math.isfinite(reward):
            return GraderResult(0.0, rewards, {"formula_parse_error": f"{self.formula.source!r} is {reward}"})
        return GraderResult(reward, rewards)
