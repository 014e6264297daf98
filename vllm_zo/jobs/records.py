"""The measurements of a job: one record for each training step and each evaluation, the lines of `metrics.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NotRequired, TypedDict, TypeGuard


class StepMetrics(TypedDict):
    """One training step.

    Losses are nats per example (for a reward: minus the reward): means over the mini-batch and all probes, or those of
    one sign. `coefficients` are those that the step applied, one for each direction: zeros where `finite` is false.
    """

    step: int
    """Counted from 1: the record belongs to the state after this many steps."""
    loss: float
    accuracy: float
    loss_plus: float | None
    loss_minus: float | None
    coefficients: list[float]
    learning_rate: float
    eps: float
    finite: bool
    """Whether every loss and coefficient of the step was finite."""
    tokens: int
    """Tokens of all steps so far, with those that members have generated."""
    seconds: float
    """Seconds since the job entered its first lane in this engine."""
    late: NotRequired[int]
    """Directions that the step went on without (`deadline`)."""
    update_norm: NotRequired[float]
    """Of a continual job: norm of the update (methods/drift.py) of the newest version before this step."""
    reward: NotRequired[float]
    rewards: NotRequired[list[float]]
    """Of rollouts, as all below: the mean reward of each probe, over the rows that were not dropped."""
    dropped: NotRequired[int]
    """Rows that counted for no probe, because a rollout of theirs failed."""
    turns: NotRequired[float]
    """Requests to the model that a rollout made, on average."""
    group_seconds: NotRequired[float]
    """Seconds from the opening of the step's group to its result."""
    waiting_seconds: NotRequired[float]
    """Those of them in which the engine had nothing to compute and waited for rollouts."""


class EvaluationMetrics(TypedDict):
    """One evaluation of the state after `step` steps. Metrics of the objective have the keys `eval_<name>`."""

    step: int
    eval_loss: float
    eval_accuracy: float
    seconds: float
    eval_rows: NotRequired[int]
    """Of rollouts, as those below: the validation rows. The mean values are those of rows that were not dropped."""
    eval_dropped: NotRequired[int]
    """Rows that were dropped, because a rollout of theirs failed."""
    eval_lowest_reward: NotRequired[float]
    """The lowest reward of a row that was not."""


Metrics = StepMetrics | EvaluationMetrics


def is_evaluation(record: Any) -> TypeGuard[EvaluationMetrics]:
    """Whether a record is that of an evaluation; otherwise it is that of a step."""
    return "eval_loss" in record


def best(evaluations: Iterable[EvaluationMetrics]) -> EvaluationMetrics | None:
    """The evaluation with the lowest loss, and the earliest of equal ones; None if no evaluation has a finite loss.

    A row that was dropped counts with the lowest reward of all evaluations. Otherwise a state under which hard rows
    fail would look better than one under which they are played and lost.
    """
    finite = [record for record in evaluations if math.isfinite(record["eval_loss"])]
    lowest = min((record.get("eval_lowest_reward", math.inf) for record in finite), default=math.inf)

    def loss(record: EvaluationMetrics) -> float:
        if not (dropped := record.get("eval_dropped", 0)):
            return record["eval_loss"]
        rows = record["eval_rows"]
        return (record["eval_loss"] * (rows - dropped) - lowest * dropped) / rows

    return min(finite, key=lambda record: (loss(record), record["step"]), default=None)


def evaluations_since_best(evaluations: Sequence[EvaluationMetrics]) -> int:
    """How many of the last evaluations were no better than one before them."""
    chosen = best(evaluations)
    return len(evaluations) if chosen is None else len(evaluations) - 1 - evaluations.index(chosen)


def given_back(evaluations: Iterable[EvaluationMetrics], last_step: int, *, keeps_best: bool) -> int:
    """Step of the state that a run gives back: that of the best evaluation if the job keeps it, else the last one.

    Args:
        last_step: number of steps in the log. A crash may leave an evaluation beyond them, whose state is lost.
        keeps_best: `JobConfig.keeps_best`.
    """
    chosen = best(record for record in evaluations if record["step"] <= last_step) if keeps_best else None
    return last_step if chosen is None else chosen["step"]
