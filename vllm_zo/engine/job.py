"""A fine-tuning job as the engine holds it: everything needed to take the next step, and what it has measured.

It needs nothing from the front end while it runs: examples are tokenised, batch order and directions come from the
seed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_zo import noise
from vllm_zo.commands import GroupResult
from vllm_zo.config import JobConfig
from vllm_zo.data.batches import BatchOrder
from vllm_zo.engine.meter import JobMeter
from vllm_zo.engine.rewarder import Rewarder
from vllm_zo.methods.base import Probe, ProbePlan
from vllm_zo.methods.schedules import eps_factor_at, learning_rate_at
from vllm_zo.methods.spaces import basis_of
from vllm_zo.methods.step_size import StepSize
from vllm_zo.objectives.base import EncodedExample

QUEUED, RUNNING, PAUSING, PAUSED = "queued", "running", "pausing", "paused"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
FINAL_STATES = (SUCCEEDED, FAILED, CANCELLED)
COMPLETION_STREAM, EVALUATION_STREAM = "completion", "evaluation"
DIVERGENCE_WINDOW = 10
"""Steps averaged for the divergence guard: enough that one unlucky batch does not stop a run."""


@dataclass(frozen=True)
class Work:
    """One group to schedule: a training step, or a piece of an evaluation (`learning_rate` None)."""

    plan: ProbePlan
    example_ids: tuple[int, ...]
    examples: tuple[EncodedExample, ...]
    learning_rate: float | None
    last_of_evaluation: bool = False
    seeds: tuple[int, ...] = ()
    """Of sampling, one a row, where the objective generates. All probes share them."""
    ends_step: bool = False
    """Whether the update follows: false for an evaluation, and where the method wants another round of probes."""


@dataclass
class Evaluation:
    """Losses and predictions of the validation examples scored so far, at one step."""

    step: int
    expected: int
    losses: list[float] = field(default_factory=list)
    predictions: list[int] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return len(self.losses) == self.expected


class Job:
    """The run's state machine. `next_work` moves forward when work is *issued*; `on_result` records what came back.

    Args:
        train, validation: tokenised examples; validation may be empty.
        eval_batch: examples per evaluation group.
        logged: coefficients of the steps before `first_step`, as the seed log has them.
    """

    def __init__(
        self,
        job_id: str,
        directory: Path,
        config: JobConfig,
        num_bases: int,
        train: Sequence[EncodedExample],
        validation: Sequence[EncodedExample],
        eval_batch: int,
        first_step: int = 0,
        evaluate_only: bool = False,
        logged: Sequence[Sequence[float]] = (),
    ) -> None:
        self.job_id = job_id
        self.directory = directory
        self.config = config
        self.space = config.space
        self.num_bases = num_bases
        self.train, self.validation = train, validation
        self.eval_batch = eval_batch
        self.evaluate_only = evaluate_only
        self.step_size = StepSize(config.method, config.learning_rate, config.learning_rate_multiplier)
        for coefficients in logged:
            self.step_size.note(coefficients)
        self.order = BatchOrder(len(train), config.examples_per_step, config.seed) if train else None
        self.step = self.first_step = first_step
        resumed = first_step > 0 and not evaluate_only
        self.basis: int | None = basis_of(config.method, first_step - 1, self.space, num_bases) if resumed else None
        """Basis of the last train step issued."""
        self.unfolded = resumed
        """In `fold` space: whether the accumulator of `basis` holds steps that are not in the base yet."""
        self.status = QUEUED
        self.error: str | None = None
        self.latest: dict[str, Any] = {}
        """Record of the last step; all of them are the recorder's."""
        self.meter = JobMeter()
        self.evaluations: list[dict[str, Any]] = []
        self.finish_requested = False
        self.ending: tuple[str, str | None] | None = None
        """(status, error) of a job that ends as soon as the groups that have already run are recorded."""
        self.outstanding = 0
        self.published: set[int] = set()
        """Versions that can be served, by step."""
        self.tokens = 0
        self._next_round: Work | None = None
        """The round that comes before anything else."""
        self._first_round: tuple[ProbePlan, GroupResult] | None = None
        """Of the step whose results are coming in."""
        self._evaluation: Evaluation | None = None
        self._eval_queue: list[tuple[int, ...]] = []
        self._eval_issued: int | None = None
        self._started = time.monotonic()
        self._num_recorded = 0
        self._first_losses: list[float] = []
        self.rewarder: Rewarder | None = None
        """What scores completions, where the objective generates."""
        self._last_losses: deque[float] = deque(maxlen=DIVERGENCE_WINDOW)

    # --- issuing work ---------------------------------------------------------------------------------------------

    def next_work(self) -> Work | None:
        """The next group, or None: everything has been issued, or the step size waits for what is under way."""
        if self._next_round is not None:
            return self._issue(self._next_round)
        if not self._eval_queue and self._evaluation_due():
            self._eval_issued = self.step
            count = len(self.validation)
            ids = range(count)
            self._evaluation = Evaluation(self.step, count)
            self._eval_queue = [tuple(ids[i : i + self.eval_batch]) for i in range(0, count, self.eval_batch)]
        if self._eval_queue:
            return self._evaluation_work()
        if self.step >= self.config.steps or self.finish_requested:
            return None
        if self.step_size.may_be_known_after(self.step) and self.outstanding:
            return None
        return self._train_work()

    def _evaluation_due(self) -> bool:
        if (
            not self.validation
            or self._eval_issued == self.step
            or (self._evaluation and not self._evaluation.complete)
        ):
            return False
        interval = self.config.eval_interval
        at_end = self.step == self.config.steps or self.finish_requested
        return at_end or self.step == 0 or bool(interval and self.step % interval == 0)

    def _evaluation_work(self) -> Work:
        ids = self._eval_queue.pop(0)
        self.outstanding += 1
        basis = self.basis if self.basis is not None else 0
        plan = ProbePlan(step=self.step, probes=(Probe(seed=0, sign=0, eps=0.0),), basis=basis)
        examples = tuple(self.validation[i] for i in ids)
        seeds = self._seeds(EVALUATION_STREAM, 0, ids, examples)
        return Work(plan, ids, examples, None, last_of_evaluation=not self._eval_queue, seeds=seeds)

    def _train_work(self) -> Work:
        config, step = self.config, self.step
        assert self.order is not None
        basis = basis_of(config.method, step, self.space, self.num_bases)
        plan = config.method.plan(config.seed, step, basis)
        plan = plan.scaled(eps_factor_at(config.eps_schedule, step, config.steps))
        ids = self.order.batch(step)
        base = self.step_size.base or 0.0
        rate = learning_rate_at(config.lr_schedule, base, step, config.steps, config.warmup_steps)
        self.step += 1
        examples = tuple(self.train[i] for i in ids)
        seeds = self._seeds(COMPLETION_STREAM, step, ids, examples)
        return self._issue(Work(plan, ids, examples, rate, seeds=seeds))

    def _issue(self, work: Work) -> Work:
        """Hand out a round of a training step, and remember the round that follows it."""
        following = self.config.method.next_round(work.plan)
        self._next_round = None if following is None else replace(work, plan=following)
        self.outstanding += 1
        return replace(work, ends_step=following is None)

    def _seeds(self, stream: str, step: int, ids: Sequence[int], examples: Sequence[EncodedExample]) -> tuple[int, ...]:
        """A function of (job, step, example, sample), so that a resumed job samples what the unbroken one did."""
        if self.rewarder is None:
            return ()
        return tuple(
            noise.derive_key(self.config.seed, stream, step, i, sample) >> 1  # vLLM's seeds are signed
            for i, example in zip(ids, examples, strict=True)
            for sample in range(len(example.rows))
        )

    def fold_due(self, work: Work) -> bool:
        """Whether the accumulator must go into the base before `work`; call once, when the work is opened."""
        due = self.unfolded and self.basis != work.plan.basis
        self.basis, self.unfolded = work.plan.basis, True
        return due

    def take_back(self, work: Work) -> None:
        """Work whose group was dropped: it is issued again later, as if nothing had happened."""
        self.outstanding -= 1
        if work.learning_rate is None:
            self._eval_queue.insert(0, work.example_ids)
        elif work.plan.round:
            self._next_round = work
        else:
            self.step, self._next_round = work.plan.step, None

    @property
    def recorded(self) -> int:
        """Steps whose result is in: those of the seed log. `step` runs ahead of it by the groups in flight."""
        return self.first_step + self._num_recorded

    @property
    def all_issued(self) -> bool:
        ended = self.step >= self.config.steps or self.finish_requested
        return ended and self._next_round is None and not self._eval_queue and not self._evaluation_due()

    # --- results --------------------------------------------------------------------------------------------------

    def on_train_result(self, work: Work, result: GroupResult) -> dict[str, Any] | None:
        """Record one step, when the result of its last round is in; its losses are those of the first round.

        Raises nothing: a divergence is reported through `divergence`.
        """
        self.outstanding -= 1
        examples = [self.train[i] for i in work.example_ids]
        self.tokens += sum(e.num_tokens for e in examples) * len(work.plan.probes)
        if work.plan.round == 0:
            self._first_round = work.plan, result
        return self._record_step(work, result) if work.ends_step else None

    def _record_step(self, work: Work, result: GroupResult) -> dict[str, Any]:
        assert self._first_round is not None
        plan, first = self._first_round
        examples, signs = [self.train[i] for i in work.example_ids], [p.sign for p in plan.probes]
        mean = [sum(row) / len(row) for row in first.losses]
        hits = sum(p == e.gold for row in first.predictions for p, e in zip(row, examples, strict=True))
        loss = sum(mean) / len(mean)
        record: dict[str, Any] = {
            "step": work.plan.step + 1,
            "loss": loss,
            "accuracy": hits / (len(examples) * len(signs)),
            "loss_plus": _mean([m for m, s in zip(mean, signs, strict=True) if s > 0]),
            "loss_minus": _mean([m for m, s in zip(mean, signs, strict=True) if s < 0]),
            "projected_grad": result.coefficients,
            "learning_rate": work.learning_rate,
            "eps": plan.probes[0].eps,
            "finite": result.finite,
            "tokens": self.tokens,
            "seconds": time.monotonic() - self._started,
        }
        if self.rewarder is not None:
            record["reward"] = -loss
        self._note_loss(loss if result.finite else float("nan"))
        self.step_size.note(result.coefficients)
        self._num_recorded += 1
        self.latest = record
        return record

    def _note_loss(self, loss: float) -> None:
        if len(self._first_losses) < DIVERGENCE_WINDOW:
            self._first_losses.append(loss)
        self._last_losses.append(loss)

    def on_evaluation_result(self, work: Work, result: GroupResult) -> dict[str, Any] | None:
        """Add a piece of an evaluation; the finished record when it was the last."""
        self.outstanding -= 1
        evaluation = self._evaluation
        assert evaluation is not None and evaluation.step == work.plan.step
        evaluation.losses += result.losses[0]
        evaluation.predictions += result.predictions[0]
        if not evaluation.complete:
            return None
        losses, predictions = evaluation.losses, evaluation.predictions
        metrics = self.config.objective.metrics(losses, predictions, self.validation)
        record = {
            "step": evaluation.step,
            "eval_loss": sum(losses) / evaluation.expected,
            **{f"eval_{name}": value for name, value in metrics.items()},
            "seconds": time.monotonic() - self._started,
        }
        self.evaluations.append(record)
        return record

    def divergence(self) -> str | None:
        """Why the run should stop, if it should (window and factor: see JobConfig.divergence_factor). Rewards have no
        scale on which one could say that they diverge."""
        if len(self._last_losses) < DIVERGENCE_WINDOW:
            return None
        if all(x != x for x in self._last_losses):
            return f"the training loss was not finite in {DIVERGENCE_WINDOW} steps in a row"
        limit = self.config.divergence_factor
        if limit is None or self.rewarder is not None or self._num_recorded < 2 * DIVERGENCE_WINDOW:
            return None
        first, last = _finite_mean(self._first_losses), _finite_mean(self._last_losses)
        if last > limit * first + 1.0:
            return f"the training loss rose from {first:.3f} to {last:.3f} nats (mean of {DIVERGENCE_WINDOW} steps)"
        return None

    def forget_examples(self) -> None:
        """At its end: an engine knows its jobs for as long as it lives, and their examples are on disk."""
        self.train = self.validation = ()

    def best(self) -> dict[str, Any] | None:
        """The evaluation with the lowest loss (ties: the earliest), or None without validation data."""
        return min(self.evaluations, key=lambda e: e["eval_loss"], default=None)

    def publish_due(self, work: Work) -> bool:
        """Whether the state after `work` becomes a version: after an evaluation, and every `publish_interval` steps."""
        if self.space != "bank" or self.evaluate_only:
            return False
        if work.learning_rate is None:
            return work.last_of_evaluation
        if not work.ends_step:
            return False
        interval = self.config.publish_interval
        return bool(interval and (work.plan.step + 1) % interval == 0)

    def snapshot_due(self, work: Work) -> bool:
        """Whether the state after `work` is saved for resuming."""
        return work.ends_step and self.space == "bank" and (work.plan.step + 1) % self.config.checkpoint_interval == 0

    def stats(self) -> dict[str, Any]:
        """Where the job stands and how fast it goes, for monitoring."""
        return {
            "status": self.status,
            "step": self.recorded,
            "steps": self.config.steps,
            "loss": self.latest.get("loss"),
            "accuracy": self.latest.get("accuracy"),
            "tokens": self.tokens,
            "steps_per_second": self.meter.steps_per_second,
            "group_latency_s": self.meter.group_latency_s,
        }

    def summary(self) -> dict[str, Any]:
        return {
            "job_id": self.job_id,
            "status": self.status,
            "error": self.error,
            "step": self.recorded,
            "steps": self.config.steps,
            "learning_rate": self.step_size.base,
            "update_space": self.space,
            "num_bases": self.num_bases,
            "best_step": (self.best() or {}).get("step"),
            "published": sorted(self.published),
        }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _finite_mean(values: Iterable[float]) -> float:
    finite = [v for v in values if v == v]
    return sum(finite) / len(finite) if finite else float("inf")
