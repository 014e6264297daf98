"""What a grader is: it takes a text and its item, and returns a reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class GraderResult:
    """The grade of one sample.

    Attributes:
        reward: usually in [0, 1]; 0.0 if grading failed.
        sub_rewards: the reward of each of its graders, if a `multi` grader made this result.
        errors: OpenAI's error flag (one of FLAGS) -> what happened; empty if grading succeeded.
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
"""The error flags that a local grader can set, with the names of OpenAI's `graders.run`. (Its other flags belong to
model graders.)"""


@runtime_checkable
class Grader(Protocol):
    """`build_grader` makes it. Any thread may call it, one at a time."""

    @property
    def name(self) -> str: ...

    @property
    def item_fields(self) -> frozenset[str]:
        """The fields that every item must have. It is empty for a python grader, whose fields nothing knows before it
        runs."""
        ...

    def __call__(self, sample_text: str, item: Mapping[str, Any]) -> GraderResult: ...
