"""The objectives. A new one needs a file here, a line in OBJECTIVES, and tests beside the others.

Another package declares its objective in the entry point group "vllm_zo.objectives"; a script calls
`OBJECTIVES.register`.
"""

from __future__ import annotations

from typing import Any

from vllm_zo.objectives.base import (
    EncodedExample,
    GeneratingObjective,
    Objective,
    ReferencedObjective,
    ScoringSequence,
    Trust,
    is_objective,
)
from vllm_zo.objectives.cells import candidate_scores, cell_offsets, flatten_sequences
from vllm_zo.objectives.classification import Classification
from vllm_zo.objectives.language_modeling import LanguageModeling
from vllm_zo.objectives.multiple_choice import MultipleChoice
from vllm_zo.objectives.preference import Preference
from vllm_zo.objectives.reward import Reward
from vllm_zo.objectives.rewards import REWARDS
from vllm_zo.objectives.rollout import Rollout
from vllm_zo.registry import Registry

OBJECTIVES: Registry[type[Any]] = Registry(
    "objective",
    is_objective,
    "a dataclass with a name, encode, loss and metrics (vllm_zo.objectives.Objective)",
    (Classification, LanguageModeling, MultipleChoice, Preference, Reward, Rollout),
)
"""`OBJECTIVES.build("classification", template=..., options=[...])` builds an objective. Lists stand for tuples, as in
JSON."""

__all__ = [
    "OBJECTIVES",
    "REWARDS",
    "Classification",
    "EncodedExample",
    "GeneratingObjective",
    "LanguageModeling",
    "MultipleChoice",
    "Objective",
    "Preference",
    "ReferencedObjective",
    "Reward",
    "Rollout",
    "ScoringSequence",
    "Trust",
    "candidate_scores",
    "flatten_sequences",
    "cell_offsets",
]
