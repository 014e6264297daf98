"""A fine-tuning job as the engine holds it: what comes next, and what has been measured.

A job needs nothing from the front end while it runs: its examples are tokenised, and its seed decides batch order and
directions. Only the job writes its own state; other parts call its methods.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from vllm_zo import noise
from vllm_zo.checkpoint.replay import fold_key
from vllm_zo.checkpoint.seed_log.format import StepRecord
from vllm_zo.commands import (
    ApplyRecord,
    Command,
    Fold,
    ForgetRows,
    GroupCells,
    GroupResult,
    Snapshot,
    StartJob,
    StopJob,
)
from vllm_zo.config import JobConfig
from vllm_zo.engine.base_pass import BasePass
from vllm_zo.engine.before_steps import pass_before
from vllm_zo.engine.evaluation import Evaluations
from vllm_zo.engine.generations import Generations
from vllm_zo.engine.group import Work
from vllm_zo.engine.measurements import Measurements
from vllm_zo.engine.open_step import OpenStep
from vllm_zo.engine.recorder import JobRecorder
from vllm_zo.engine.references import References
from vllm_zo.engine.rewarder import Cells, Rewarder
from vllm_zo.engine.rollouts import Cost
from vllm_zo.engine.training_rows import FixedRows, TrainingRows
from vllm_zo.engine.versions import Versions
from vllm_zo.engine.written_tokens import WrittenTokens
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.records import best, evaluations_since_best
from vllm_zo.jobs.status import FINAL, JobStatus
from vllm_zo.methods.layers import layer_of
from vllm_zo.methods.plan import ModuleShape, Probe, ProbePlan
from vllm_zo.methods.schedules import eps_factor_at, learning_rate_at
from vllm_zo.methods.spaces import basis_of
from vllm_zo.methods.step_size import StepSize
from vllm_zo.objectives import Rollout
from vllm_zo.objectives.base import EncodedExample, GeneratingObjective, steps_per_generation

logger = logging.getLogger("vllm.zo")

COMPLETION_STREAM, EVALUATION_STREAM = "completion", "evaluation"
MOVES = {
    JobStatus.QUEUED: {JobStatus.RUNNING, JobStatus.PAUSING, *FINAL},
    JobStatus.RUNNING: {JobStatus.PAUSING, *FINAL},
    JobStatus.PAUSING: {JobStatus.PAUSED, JobStatus.RUNNING, *FINAL},
    JobStatus.PAUSED: {JobStatus.QUEUED, *FINAL},
}
"""The statuses that may follow each status. A job that has ended keeps its status."""
Ending = tuple[JobStatus, str | None]
"""The status with which a job ends, and the error that explains it."""


class Job:
    """One run. `next_work` moves forward when work is *issued*; `on_result` records what came back.

    A step takes one of two roads. On the *device path* one group scores all of it, and the worker decides and updates
    on the device; nothing waits for the host. On the *log path* (`JobConfig.shards`) groups score it in shards, this
    object decides and logs it, and the workers apply the record. The second road needs a round trip a step, and is the
    one that several engines can take together.

    Args:
        start: the command that makes its state in the workers; sent when it first has a lane.
        eval_batch: examples per evaluation group.
        rewarder: scores the completions of an objective that generates; None where no member writes.
        logged: coefficients of the steps before `first_step`, as the seed log has them.
        rows: what it trains on; None: the rows of its directory.
    """

    def __init__(
        self,
        directory: JobDir,
        config: JobConfig,
        num_bases: int,
        start: StartJob,
        eval_batch: int,
        recorder: JobRecorder,
        rewarder: Rewarder | None = None,
        first_step: int = 0,
        evaluate_only: bool = False,
        logged: Sequence[Sequence[float]] = (),
        rows: TrainingRows | None = None,
    ) -> None:
        self.job_id = directory.job_id
        self.directory, self.config, self.num_bases = directory, config, num_bases
        self.space = config.space
        self.recorder, self.rewarder = recorder, rewarder
        self.evaluate_only = evaluate_only
        self.first_step = first_step
        self._start: StartJob | None = start
        """None once the job has begun."""
        self.rows: TrainingRows = FixedRows(directory, config) if rows is None else rows
        self._validation: Sequence[EncodedExample] = ()
        self._rewarded = isinstance(config.objective, GeneratingObjective | Rollout)
        """Whether it learns from rewards."""
        together = steps_per_generation(config.objective)
        self._generations = None if together is None else Generations(directory, self.rows, together)
        """What the steps score of what the state has written; None: losses are minus what probes earn, or no rewards.
        """
        self._step_size = StepSize(
            config.method, config.learning_rate, config.learning_rate_multiplier,
            rewarded=self._rewarded and self._generations is None,
            together=together or 1,
        )  # fmt: skip
        self._logged = logged
        self._eval_batch = eval_batch
        self._evaluations = Evaluations(0, eval_batch, config.eval_interval)
        self._base_pass: BasePass | None = None
        """While the base has yet to score examples."""
        # Of a continual job the rows may change their meaning, and with it their loss.
        guard = None if config.continual else config.divergence_factor
        self._measured = Measurements(recorder, rewarded=self._rewarded, divergence_factor=guard)

        self._status = JobStatus.QUEUED
        self._error: str | None = None
        self._waits_for: str | None = None
        """Why a running job takes no step now; None while it may."""
        self._paused_because: str | None = None
        """Why the job has asked to rest itself; None: it has not."""
        self._finish_early = False
        self._entered: float | None = None
        """When the job entered the lane that it has (`time.monotonic`); None while it has none."""
        self._seconds = 0.0
        """How long it was in lanes before."""
        self._ending: Ending | None = None
        """How the job must end once its groups in flight are back. It waits for them because the workers have made
        their updates, which the log must hold."""
        self._step = first_step
        """Training steps issued. Runs ahead of `recorded` by the groups that are open or in flight."""
        self._outstanding = 0
        """Groups that are open or in flight."""
        self._open: OpenStep | None = None
        """The training step under way, on the log path."""
        self._commands: list[Command] = []
        """What the workers have yet to be told: see `take_commands`."""
        resumed = first_step > 0 and not evaluate_only
        self._basis: int | None = basis_of(config.method, first_step - 1, self.space, num_bases) if resumed else None
        """Basis of the last training step that was opened; followed in `fold` space only."""
        self._unfolded = resumed
        """Whether the accumulator of `_basis` holds steps that are not in the base yet."""
        self.versions = Versions(directory, config, start.versions)

    # --- status -------------------------------------------------------------------------------------------------------

    @property
    def status(self) -> JobStatus:
        return self._status

    def _move(self, to: JobStatus) -> None:
        assert to in MOVES.get(self._status, ()), f"job {self.job_id} cannot go from {self._status} to {to}"
        self._status = to

    @property
    def begun(self) -> bool:
        """Whether the job has ever had a lane: the workers know it, and its examples are in memory."""
        return self._start is None

    def enter(self) -> list[Command]:
        """Run in the lane that the job was given; returns what the workers do first.

        The first time it reads its examples: a job that waits does not hold them in memory.

        Raises:
            OSError, ValueError, MsgspecError: a file cannot be read.
        """
        start, commands = self._start, list[Command]()
        if start is not None:
            self._read_examples()
            # After the reading: the workers are never told of a job that could not be read (see `at_end`).
            self._start = None
            self._measured.begin()
            commands += [start, *self.take_commands()]
        self._move(JobStatus.RUNNING)
        self._entered = time.monotonic()
        return commands

    def open_log(self, modules: Sequence[ModuleShape]) -> None:
        """Open the job's files, now that the workers know its modules. Raises what `JobRecorder.open` raises."""
        if not self.config.continual and not self.evaluate_only:
            layers = len({layer_of(module.name) for module in modules})
            self._step_size.expect(self.config.steps, layers, len(self.rows))
        # A learning rate "auto" is a function of the first steps' coefficients: a resumed run must find the same one.
        for coefficients in self._logged:
            self._step_size.note(coefficients)
        self.recorder.open(modules, evaluates_again=self._evaluation_left)
        if self.first_step and not self.evaluate_only:
            self._measured.remember(self.directory.read_metrics())

    def _read_examples(self) -> None:
        self.rows.read()
        if self._generations is not None and not self.evaluate_only:
            self._generations.recall(self.first_step)
        self._validation = self.directory.read_validation()
        if isinstance(objective := self.config.objective, Rollout):
            self._validation = [objective.evaluated(example) for example in self._validation]
        self._evaluations = Evaluations(len(self._validation), self._eval_batch, self.config.eval_interval)
        needed = pass_before(
            self.directory, self.config, self.rows, self._validation,
            trains=not self.evaluate_only, first_step=self.first_step, piece=self._eval_batch,
        )  # fmt: skip
        if needed is not None:
            self._wait_for(needed)

    @property
    def fixed_rows(self) -> FixedRows:
        """The rows of a job that has all of them from the beginning."""
        assert isinstance(self.rows, FixedRows)
        return self.rows

    def _wait_for(self, base_pass: BasePass) -> None:
        """Take no step before the base has scored all examples of a pass; then use what it has said."""
        if base_pass.missing:
            if self._base_pass is None:
                logger.info(
                    "job %s: the base reads %d rows before the first step, for %s",
                    self.job_id, base_pass.missing, base_pass.purpose,
                )  # fmt: skip
            self._base_pass = base_pass
            return
        self._base_pass = None
        self._commands += base_pass.commands()
        if (then := base_pass.then()) is not None:
            self._wait_for(then)
        if isinstance(base_pass, References):
            self.fixed_rows.examples, self._validation = base_pass.attached()

    def pause(self) -> None:
        """Rest at the next group boundary; see `may_rest`."""
        if self._status not in (JobStatus.PAUSING, JobStatus.PAUSED):
            self._move(JobStatus.PAUSING)

    @property
    def may_rest(self) -> bool:
        """Whether the job was asked to rest and none of its groups is open or in flight."""
        return self._status == JobStatus.PAUSING and not self._outstanding

    def rest(self) -> None:
        self._move(JobStatus.PAUSED)
        if self._entered is not None:
            self._seconds, self._entered = self._seconds + time.monotonic() - self._entered, None

    def resume(self) -> None:
        """Run on, or queue again if the job had come to rest."""
        self._paused_because = None
        self._move(JobStatus.RUNNING if self._status == JobStatus.PAUSING else JobStatus.QUEUED)

    @property
    def moves(self) -> bool:
        """Whether an engine step can move the job on, once it is in a lane."""
        return True

    def finish_early(self) -> None:
        """Take no further step: evaluate, publish, succeed."""
        self._finish_early = True

    def may_end(self, ending: Ending) -> bool:
        """Whether the job can end now; if not, it ends when the results of its groups in flight are in."""
        if self._outstanding:
            self._ending = ending
        return not self._outstanding

    def end(self, status: JobStatus, error: str | None) -> None:
        """Close the job's files. A job whose last steps are in no log has not succeeded."""
        self.recorder.close()  # before the status is decided: this last write may meet a full disk
        if status == JobStatus.SUCCEEDED and self.recorder.error is not None:
            status, error = JobStatus.FAILED, str(self.recorder.error)
        self._move(status)
        self._error = error

    def verdict(self) -> Ending | None:
        """How the job must end because it was stopped or diverges; None if it may go on."""
        if self._ending is not None:
            return self._ending
        if (why := self._measured.divergence()) is not None:
            return JobStatus.FAILED, f"{why}; lower the learning rate. The state up to the best evaluation is kept."
        return None

    def is_complete(self) -> bool:
        """Whether the job runs, has issued all steps and evaluations, and the disk has all their results."""
        runs = self._status == JobStatus.RUNNING and not self.recorder.waiting
        measured = runs and self._no_more_steps and not self._outstanding and not self._evaluation_left
        # With an error, `waits_for_disk` retries at its own pace; a sync here would be one fsync an engine step.
        if measured and self.recorder.error is None:
            self.recorder.sync()
        return measured and not self.waits_for_disk()

    def waits_for_disk(self) -> bool:
        """Whether the disk refuses what the job has measured (it is full). The job takes no step meanwhile and goes on
        by itself when there is space, so that no step is lost."""
        self.recorder.retry()
        error = self.recorder.error
        if error is not None and self._waits_for is None:
            logger.warning("job %s waits: %s", self.job_id, error)
        if error is None and self._waits_for is not None:
            logger.info("job %s goes on: all of it is on the disk now", self.job_id)
        self._waits_for = None if error is None else str(error)
        return error is not None

    @property
    def _no_more_steps(self) -> bool:
        return self._step >= self.config.steps or self._finish_early

    @property
    def _evaluation_left(self) -> bool:
        return self._evaluations.has_pieces or self._evaluations.is_due(self._step, at_end=self._no_more_steps)

    # --- issuing work -------------------------------------------------------------------------------------------------

    def next_work(self) -> Work | None:
        """The work of the next group. None: everything is issued, the job may not go on now, or the step size depends
        on groups that are still under way."""
        if self._status != JobStatus.RUNNING or self._ending is not None or self.recorder.waiting:
            return None
        if self.waits_for_disk():
            return None
        if self._open is not None:  # nothing else: what follows needs the state after this step
            return self._issue(self._open.next_shard())
        self._look_at_the_clock()
        if self._base_pass is not None:  # every step needs it
            return self._issue(self._base_pass.next_work(self._step))
        if self._evaluations.is_due(self._step, at_end=self._no_more_steps):
            self._evaluations.begin(self._step)
        # All pieces before the next training step, which would change the state that they measure.
        if self._evaluations.has_pieces:
            return self._issue(self._evaluation_work())
        if self._no_more_steps or (self._step_size.may_be_known_after(self._step) and self._outstanding):
            return None
        # The evaluation under way may be the one that ends the job.
        if self.config.patience is not None and self._evaluations.under_way:
            return None
        if self._generations is not None and not self._generations.covers(self._step):
            return self._issue(self._generation_work(self._generations))
        if self.config.shards is None:
            return self._issue(self._train_work())
        # A piece may be scored again, by another engine than the one that had it: the state must not move on before.
        if self._evaluations.under_way:
            return None
        step = self._train_work()
        self._open = OpenStep(step, self.config.shards)
        return self._issue(self._open.next_shard())

    def _issue(self, work: Work | None) -> Work | None:
        self._outstanding += work is not None
        return work

    def _look_at_the_clock(self) -> None:
        """Finish early once the job has run for its `max_seconds`."""
        most = self.config.max_seconds
        if most is None or self._no_more_steps or self._entered is None:
            return
        if self._seconds + time.monotonic() - self._entered >= most:
            logger.info("job %s takes no step after %d: max_seconds=%g", self.job_id, self._step, most)
            self.finish_early()

    @property
    def _centre(self) -> ProbePlan:
        """The plan of a group that asks the job's own state."""
        # In `fold` space the accumulator that is not folded yet is expressed in the basis of the last step.
        basis = self._basis if self._basis is not None else 0
        return ProbePlan(step=self._step, probes=(Probe(key=0, sign=0, eps=0.0),), basis=basis)

    def _generation_work(self, generations: Generations) -> Work | None:
        """What the state writes for its next steps; None: it is writing, or steps are under way whose log a resumed job
        needs first."""
        if self._outstanding or not self.recorder.hand_over():
            return None
        drawn = generations.rows(self._step)
        seeds = self._sampling_seeds(COMPLETION_STREAM, self._step, drawn.ids, drawn.examples)
        return Work(self._centre, drawn.ids, drawn.examples, None, sampling_seeds=seeds, writes=True)

    def _evaluation_work(self) -> Work:
        ids, plan = self._evaluations.take(), self._centre
        examples = tuple(self._validation[i] for i in ids)
        seeds = self._sampling_seeds(EVALUATION_STREAM, 0, ids, examples)
        is_last = not self._evaluations.has_pieces
        return Work(plan, ids, examples, None, last_of_evaluation=is_last, sampling_seeds=seeds)

    def _train_work(self) -> Work:
        config, step = self.config, self._step
        basis = basis_of(config.method, step, self.space, self.num_bases)
        plan = config.method.plan(config.seed, step, basis)
        plan = plan.scaled(self._step_size.radius * eps_factor_at(config.eps_schedule, step, config.steps))
        drawn = self.rows.draw(step) if self._generations is None else self._generations.draw(step)
        base = self._step_size.base or 0.0  # None while "auto" still measures: such a step changes nothing
        rate = learning_rate_at(config.lr_schedule, base, step, config.steps, config.warmup_steps)
        self._step += 1
        seeds: tuple[int, ...] = ()
        if self._generations is None:
            seeds = self._sampling_seeds(COMPLETION_STREAM, step, drawn.ids, drawn.examples)
        return Work(plan, drawn.ids, drawn.examples, rate, sampling_seeds=seeds, appended=drawn.appended)

    def _sampling_seeds(
        self, stream: str, step: int, ids: Sequence[int], examples: Sequence[EncodedExample]
    ) -> tuple[int, ...]:
        """One seed a sequence, or none where the losses are no rewards.

        A seed is a function of (job, step, example, sample), so that a resumed job samples what an unbroken one would.
        """
        if not self._rewarded:
            return ()
        return tuple(
            noise.derive_seed(self.config.seed, stream, step, i, sample)
            for i, example in zip(ids, examples, strict=True)
            for sample in range(len(example.sequences))
        )

    def before(self, work: Work) -> list[Command]:
        """What the workers do before the group of `work` opens: in `fold` space, fold a finished basis into the base.

        To be called once a group: the second call would find nothing to fold.
        """
        if self.space != "fold" or not work.trains:
            return []
        due = self._unfolded and self._basis != work.plan.basis
        self._basis, self._unfolded = work.plan.basis, True
        return [self._fold(work.plan.step)] if due else []

    def after(self, work: Work) -> list[Command]:
        """What the workers do with the state after `work`: publish it, or save it for resuming."""
        if work.reports_cells or work.writes:
            return []
        # In `fold` space most of the update is in the base: the accumulator alone is no adapter, and resumes nothing.
        if self.space != "bank" or self.evaluate_only:
            return []
        steps = work.plan.step + work.trains  # a training step makes one more, an evaluation leaves the state as it is
        commands = self.versions.publish(steps) if self.versions.due(work, steps) else []
        if work.trains and steps % self.config.checkpoint_interval == 0:
            commands.append(Snapshot(self.job_id, str(self.directory.snapshot), steps))
        return commands

    def at_end(self) -> list[Command]:
        """What the workers do with the job's last state before they forget the job."""
        if not self.begun:
            return []
        commands: list[Command] = []
        # With validation data, every evaluation has published the state that it measured.
        if self.space == "bank" and not self._validation and self.recorded > 0:
            commands += self.versions.publish(self.recorded)
        elif self.space == "fold" and self._unfolded and not self.recorder.waiting:
            commands.append(self._fold(self.recorded))
        return [*commands, StopJob(self.job_id)]

    def _fold(self, step: int) -> Fold:
        return Fold(self.job_id, fold_key(self.config.seed, step))

    def take_back(self, work: Work) -> None:
        """Take back the work of a dropped group: it is issued again later, as if nothing had happened."""
        self._outstanding -= 1
        # Only an open group is dropped, and that is the job's newest: no later step is under way.
        if work.plan.of_base:
            assert self._base_pass is not None
            self._base_pass.put_back(work.example_ids)
        elif work.shard is not None:
            assert self._open is not None
            self._open.put_back(work.shard)
        elif work.trains:
            self._step = work.plan.step
        elif not work.writes:  # what is not written is due again by itself
            self._evaluations.put_back(work.example_ids)

    @property
    def recorded(self) -> int:
        """Steps whose result is in: as many as the seed log has."""
        return self.first_step + self._measured.steps

    # --- results ------------------------------------------------------------------------------------------------------

    def wrote(self, num_tokens: int) -> None:
        """Count the tokens of a completion that a member has finished."""
        self._measured.wrote(num_tokens)

    def base_wrote(self, work: Work, completions: Sequence[Sequence[int]]) -> None:
        """Take in what the base has written before the first step."""
        assert isinstance(self._base_pass, WrittenTokens)
        self._base_pass.wrote(work, completions)

    def generated(self, work: Work, completions: Sequence[Sequence[int]], rewards: Cells) -> list[Command]:
        """Take in what the state has written for its next steps; returns what the workers do."""
        assert self._generations is not None
        self._generations.wrote(work, completions, rewards)
        return [ForgetRows(self.job_id)]

    @property
    def writes(self) -> bool:
        """Whether members of its next group may write."""
        if self.rewarder is None:
            return False
        scores = self._generations is not None and self._generations.covers(self._step)
        return not scores or self._base_pass is not None or self._evaluation_left

    def on_result(
        self,
        work: Work,
        result: GroupResult | GroupCells,
        opened_at: float,
        cells: Cells | None = None,
        cost: Cost | None = None,
    ) -> None:
        """Record what a closed group measured. Afterwards `verdict` tells of a divergence, `waits_for_disk` of a full
        disk, and `take_commands` what the workers do.

        Args:
            opened_at: when the group was opened (`time.monotonic`).
            cells: (probes, sequences) rewards that the group was closed with.
            cost: of the rollouts that the group had.
        """
        self._outstanding -= 1
        if cost is not None:
            self._measured.played(cost)
        if isinstance(result, GroupCells) and work.plan.of_base:
            assert self._base_pass is not None
            self._base_pass.add(work, result.cells)
            self._wait_for(self._base_pass)
        elif isinstance(result, GroupCells):
            self._on_shard(work, result)
        elif work.trains:
            self._on_step(work, result, opened_at, cells)
        elif not work.writes:
            losses = result.losses if cells is None else _unshaped_losses(cells, len(work.examples))
            whole = self._evaluations.add(work.plan.step, work.example_ids, losses[0], result.predictions[0])
            if whole is not None:
                self._on_evaluation(work.plan.step, *whole)

    def _on_evaluation(self, step: int, losses: list[float], predictions: list[int]) -> None:
        examples, of_rows = self._validation, {}
        if isinstance(self.config.objective, Rollout):
            rows = len(examples)
            losses, predictions, examples = _without_dropped(losses, predictions, examples)
            of_rows = {"rows": rows, "dropped": rows - len(examples), "lowest_reward": -max(losses)}
        metrics = self.config.objective.metrics(losses, predictions, examples)
        self._measured.evaluation(step, losses, metrics | of_rows)
        self._mind_patience(step)

    def _mind_patience(self, step: int) -> None:
        """Finish early if the evaluations have not become better for `patience` times."""
        patience, stale = self.config.patience, evaluations_since_best(self._measured.evaluations)
        if patience is not None and stale >= patience and not self._no_more_steps:
            logger.info(
                "job %s stops after step %d: %d evaluations in a row were no better (patience=%d)",
                self.job_id, step, stale, patience,
            )  # fmt: skip
            self.finish_early()

    def _on_shard(self, work: Work, result: GroupCells) -> None:
        """Take in a shard's cells. With the last of them: decide, log, and have the workers apply what was logged."""
        step = self._open
        assert step is not None and work.shard is not None and work.plan.step == step.work.plan.step
        if step.add(work.shard, result.cells):
            self._close(step, result.group_id)

    def drop_late(self) -> bool:
        """Take the step under way without the directions that have no score yet, if it may; returns whether it has.

        What is still answered for it must not come to `on_result`.
        """
        step = self._open
        if step is None or (issued := step.drop_late()) is None:
            return False
        self._outstanding -= issued
        self._close(step, f"step {step.work.plan.step}")
        return True

    def _close(self, step: OpenStep, group_id: str) -> None:
        self._open, whole, config = None, step.counted, self.config
        decided = step.decide(group_id, config.method, config.objective, config.max_coefficient)
        self._on_step(whole, decided, step.opened_at, step.rewards() if whole.sampling_seeds else None)
        assert whole.learning_rate is not None
        record = StepRecord(
            whole.plan.step, whole.learning_rate, tuple(decided.coefficients), decided.finite, whole.appended
        )
        self._commands += [ApplyRecord(self.job_id, record), *self.after(whole)]

    def _on_step(self, work: Work, result: GroupResult, opened_at: float, cells: Cells | None) -> None:
        losses = result.losses if cells is None else _unshaped_losses(cells, len(work.examples))
        self._step_size.note(result.coefficients)
        self._measured.step(work, opened_at, losses, result)

    def on_digest(self, steps: int, digest: int) -> None:
        """Take the digest of the state after `steps` steps. Only a coordinator asks for it (`ReportDigest`)."""

    def on_drift(self, norm: float) -> bool:
        """Take in how far the newest version is from the base; returns whether the job has to rest because of it."""
        self._measured.drift = norm
        limit = self.config.max_drift
        if limit is None or norm <= limit or self._status != JobStatus.RUNNING:
            return False
        self._paused_because = (
            f"the norm of the update is {norm:.4g}, above max_drift={limit:g}; resume it to go on to the next version, "
            "or start a job with weight_decay"
        )
        logger.warning("job %s is paused: %s", self.job_id, self._paused_because)
        return True

    def take_commands(self) -> list[Command]:
        """What the workers do before anything else, because of results that are in. (Only the log path has some.)"""
        commands, self._commands = self._commands, []
        return commands

    def forget_examples(self) -> None:
        """Free the examples of a job that has ended: the engine keeps it until it is dropped (`zo_drop`)."""
        self.rows.forget()
        self._validation = ()

    # --- for other parts ----------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Where the job stands and how fast it goes, for monitoring."""
        return {
            "status": self._status,
            "step": self.recorded,
            "steps": None if self.config.continual else self.config.steps,
            **self._measured.stats(),
        }

    def summary(self) -> dict[str, Any]:
        evaluations = self._measured.evaluations
        return {
            "job_id": self.job_id,
            "status": self._status,
            "error": self._error,
            "waits_for": self._waits_for,
            "paused_because": self._paused_because,
            "step": self.recorded,
            "steps": None if self.config.continual else self.config.steps,
            "learning_rate": self._step_size.base,
            "update_space": self.space,
            "num_bases": self.num_bases,
            "initial": evaluations[0] if evaluations else None,
            "best": best(evaluations),
            "published": self.versions.steps,
            "gives_back": self.versions.given_back(evaluations),
        }


def _without_dropped(
    losses: Sequence[float], predictions: Sequence[int], examples: Sequence[EncodedExample]
) -> tuple[list[float], list[int], list[EncodedExample]]:
    """The results of an evaluation less those of rows that were dropped. Some are left, see `Rollouts.cells`."""
    kept = [i for i, loss in enumerate(losses) if not math.isnan(loss)]
    return [losses[i] for i in kept], [predictions[i] for i in kept], [examples[i] for i in kept]


def _unshaped_losses(cells: Cells, examples: int) -> list[list[float]]:
    """(probes, examples) minus the mean reward of each example's samples.

    Records show these whatever shaping of the rewards the objective optimises.
    """
    samples = len(cells[0]) // examples
    return [[-sum(of_probe[e * samples : (e + 1) * samples]) / samples for e in range(examples)] for of_probe in cells]
