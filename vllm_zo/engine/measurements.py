"""The measurements of a job: its records, and the figures that follow from them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from vllm_zo.commands import GroupResult
from vllm_zo.engine.divergence import DivergenceGuard
from vllm_zo.engine.group import Work
from vllm_zo.engine.meter import JobMeter
from vllm_zo.engine.recorder import JobRecorder
from vllm_zo.engine.rollouts import Cost
from vllm_zo.jobs.records import EvaluationMetrics, Metrics, StepMetrics, is_evaluation
from vllm_zo.objectives.written import rewards_of

Losses = list[list[float]]
"""(probes, examples) nats; for an objective that generates: minus the rewards."""


class Measurements:
    """Makes a record of every step and evaluation and hands it to the recorder.

    Args:
        rewarded: losses are minus rewards. The scale of a reward is unknown, so no factor tells a divergence.
        divergence_factor: `JobConfig.divergence_factor`.
    """

    def __init__(self, recorder: JobRecorder, *, rewarded: bool, divergence_factor: float | None) -> None:
        self.steps = 0
        self.evaluations: list[EvaluationMetrics] = []
        self._recorder, self._rewarded = recorder, rewarded
        self._guard = DivergenceGuard(None if rewarded else divergence_factor)
        self._meter = JobMeter()
        self.drift: float | None = None
        """Norm of the update when a version was last published, of a continual job."""
        self._tokens = 0
        self._played: list[Cost] = []
        """Of the step or the evaluation that is under way."""
        self._latest: StepMetrics | None = None
        self._started = time.monotonic()

    def begin(self) -> None:
        """Start the job's clock, when it enters its first lane."""
        self._started = time.monotonic()

    def remember(self, records: Iterable[Metrics]) -> None:
        """Take over the evaluations of a run that this one continues: the best of them may be better than any later."""
        self.evaluations = [record for record in records if is_evaluation(record)]

    def wrote(self, num_tokens: int) -> None:
        """Count the tokens of a completion that a member has finished."""
        self._tokens += num_tokens

    def played(self, cost: Cost) -> None:
        """Take in what the rollouts of a group have cost. A step may have several groups, its shards."""
        self._tokens += cost.tokens
        self._played.append(cost)

    def step(self, work: Work, opened_at: float, losses: Losses, result: GroupResult) -> None:
        """Record a training step.

        Args:
            opened_at: when its group was opened (`time.monotonic`).
            losses: (probes, examples) nats; of rollouts, NaN where a row was dropped.
        """
        assert work.learning_rate is not None
        predictions, played = result.predictions, self._played
        examples, signs = work.examples, [p.sign for p in work.plan.probes]
        if played:
            every = range(len(examples))
            # All of them where none is left, as shards that drop different rows can have it: the loss then is NaN.
            kept = [row for row in every if not any(math.isnan(of_probe[row]) for of_probe in losses)] or every
            examples = tuple(examples[row] for row in kept)
            losses = [[of_probe[row] for row in kept] for of_probe in losses]
            predictions = [[of_probe[row] for row in kept] for of_probe in predictions]
        self._meter.note(opened_at)
        self._tokens += sum(e.num_tokens for e in examples) * len(signs)
        mean = [sum(of_probe) / len(of_probe) for of_probe in losses]
        hits = sum(p == e.gold for of_probe in predictions for p, e in zip(of_probe, examples, strict=True))
        loss = sum(mean) / len(mean)
        record: StepMetrics = {
            "step": work.plan.step + 1,
            "loss": loss,
            "accuracy": hits / (len(examples) * len(signs)),
            "loss_plus": _mean([m for m, sign in zip(mean, signs, strict=True) if sign > 0]),
            "loss_minus": _mean([m for m, sign in zip(mean, signs, strict=True) if sign < 0]),
            "coefficients": result.coefficients,
            "learning_rate": work.learning_rate,
            "eps": work.plan.probes[0].eps,
            "finite": result.finite,
            "tokens": self._tokens,
            "seconds": time.monotonic() - self._started,
        }
        if result.finite and (late := len(result.coefficients) - len(work.plan.keys)):
            record["late"] = late
        if self._rewarded:
            record["reward"] = -loss if examples[0].rewards is None else rewards_of(examples).mean().item()
        if self.drift is not None:
            record["update_norm"] = self.drift
        if played:
            record["rewards"] = [-m for m in mean]
            record["dropped"] = len(work.examples) - len(examples)
            record["turns"] = sum(of.requests for of in played) / (len(work.examples) * len(signs))
            record["group_seconds"] = time.monotonic() - opened_at
            record["waiting_seconds"] = sum(of.idle_s for of in played)
            self._played = []
        # `loss` may be finite where a coefficient was not: such a step changed nothing.
        self._guard.note(loss if result.finite else math.nan)
        self.steps += 1
        self._latest = record
        # In this order: after a crash the metrics may be ahead of the log, and resuming cuts them back. A log that is
        # ahead of its metrics would leave steps without a record.
        self._recorder.metrics(record)
        self._recorder.step(work.plan.step, work.learning_rate, result.coefficients, result.finite, work.appended)

    def evaluation(self, step: int, losses: list[float], metrics: Mapping[str, float]) -> None:
        """Record a whole evaluation of the state after `step` steps. `losses`: (examples,) nats."""
        self._played = []
        record: Any = {
            "step": step,
            "eval_loss": sum(losses) / len(losses),
            **{f"eval_{name}": value for name, value in metrics.items()},
            "seconds": time.monotonic() - self._started,
        }
        self.evaluations.append(record)
        self._recorder.metrics(record)

    def divergence(self) -> str | None:
        """Why the job should stop, or None."""
        return self._guard.verdict()

    def stats(self) -> dict[str, Any]:
        """The latest loss and accuracy, and the job's pace, for monitoring."""
        latest = self._latest
        return {
            "loss": None if latest is None else latest["loss"],
            "accuracy": None if latest is None else latest["accuracy"],
            "update_norm": self.drift,
            "tokens": self._tokens,
            "steps_per_second": self._meter.steps_per_second,
            "group_latency_s": self._meter.group_latency_s,
        }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
