"""What a grader is: a text and its item in, a reward out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class GraderResult:
    """One sample's grade.

    Attributes:
        reward: usually in [0, 1]; 0.0 where grading failed.
        sub_rewards: of a `multi` grader, the reward of each of its graders.
        errors: OpenAI's error flag -> what happened; empty where grading succeeded. Flags in use: FLAGS.
    """

    reward: float
    sub_rewards: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @classmethod
    def failed(cls, flag: str, detail: str) -> GraderResult:
        assert flag in FLAGS
        return cls(0.0, errors={flag: detail})


FLAGS = (
    "formula_parse_error",
    "invalid_variable_error",
    "sample_parse_error",
    "python_grader_runtime_error",
    "python_grader_server_error",
    "unresponsive_reward_error",
    "other_error",
)
"""Error flags a local grader can raise, as OpenAI's `graders.run` names them (its others belong to model graders)."""


@runtime_checkable
class Grader(Protocol):
    """Built by `build_grader`; may be called from any one thread at a time."""

    @property
    def name(self) -> str: ...

    @property
    def item_fields(self) -> frozenset[str]:
        """Fields every item must have; what a python grader reads is not known before it runs."""
        ...

    def __call__(self, sample_text: str, item: Mapping[str, Any]) -> GraderResult: ...
