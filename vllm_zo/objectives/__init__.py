"""The objectives. A new one is a file here, a line in OBJECTIVES and tests beside the others."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import EncodedExample, Objective, ScoringRow
from vllm_zo.objectives.cells import candidate_scores, flatten_rows, row_offsets
from vllm_zo.objectives.classification import Classification
from vllm_zo.objectives.language_modeling import LanguageModeling
from vllm_zo.objectives.multiple_choice import MultipleChoice
from vllm_zo.objectives.reward import Reward
from vllm_zo.validation import check_keys, check_known

OBJECTIVES: dict[str, type[Any]] = {
    Classification.name: Classification,
    LanguageModeling.name: LanguageModeling,
    MultipleChoice.name: MultipleChoice,
    Reward.name: Reward,
}


def build_objective(name: str, **settings: Any) -> Objective:
    """The objective called `name`; lists may stand for tuples, as they do in JSON.

    Example:
        >>> build_objective("classification", template="{text} It was", options=[" bad", " good"]).options
        (' bad', ' good')

    Raises:
        ConfigError: unknown objective or field (with the nearest known name), a missing field, or a bad value.
    """
    check_known("objective", name, OBJECTIVES)
    objective = OBJECTIVES[name]
    known = fields(objective)
    check_keys(f"field of objective {name}", settings, [f.name for f in known])
    for f in known:
        if f.name not in settings and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"objective.{f.name} is missing: objective {name!r} needs it.")
    built: Objective = objective(**settings)
    return built


def describe(objective: Any) -> dict[str, Any]:
    """`{"name": ..., fields}`, ready for JSON: `build_objective(**json.loads(json.dumps(describe(o)))) == o`."""
    return {"name": objective.name, **asdict(objective)}


__all__ = [
    "OBJECTIVES",
    "Classification",
    "EncodedExample",
    "LanguageModeling",
    "MultipleChoice",
    "Objective",
    "Reward",
    "ScoringRow",
    "build_objective",
    "candidate_scores",
    "describe",
    "flatten_rows",
    "row_offsets",
]
