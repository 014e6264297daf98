"""The training side of the scheduler: which job runs, which group is open, what the workers are told. No vLLM here.

One engine step, in the order the scheduler calls it:

    offer(capacity)            members that may start now; opens the next group or probe wave when there is room
    commands_for(scheduled)    what rides on the SchedulerOutput: materialise, score, close
    on_results(results)        losses and applied coefficients come back: metrics, seed log, next phase
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_zo.checkpoint.replay import fold_key
from vllm_zo.commands import (
    CloseGroup,
    DropGroup,
    Fold,
    GroupResult,
    Materialise,
    OpenGroup,
    Publish,
    ScoreMember,
    Snapshot,
    StartJob,
    StopJob,
    Unpublish,
    ZOCommands,
    ZOResults,
)
from vllm_zo.engine.admission import Capacity, admit
from vllm_zo.engine.group import Member, PerturbationGroup
from vllm_zo.engine.job import CANCELLED, FAILED, FINAL_STATES, RUNNING, SUCCEEDED, Job, Work
from vllm_zo.engine.recorder import JobRecorder
from vllm_zo.engine.slot_table import SlotTable
from vllm_zo.errors import ConfigError, ZOError
from vllm_zo.methods.base import ModuleShape

logger = logging.getLogger("vllm.zo")


class Controller:
    """Owns the jobs, the open group and the slot table. Called from the engine's step loop only.

    Jobs run one after another in the order they were started.
    """

    def __init__(self, num_slots: int, block_size: int) -> None:
        self.slots = SlotTable(num_slots)
        self.block_size = block_size
        self.jobs: dict[str, Job] = {}
        self.recorders: dict[str, JobRecorder] = {}
        self.queue: deque[str] = deque()
        self.group: PerturbationGroup | None = None
        self._work: dict[str, tuple[Job, Work]] = {}
        self._commands = ZOCommands()
        self._group_count = 0
        self.folds_since_reset = False
        """A fold was issued: cached KV of the base is stale. The scheduler resets its prefix cache and this flag."""
        self.folded_by: str | None = None
        """The job whose folds are in the base weights, until they are restored."""

    # --- jobs -----------------------------------------------------------------------------------------------------

    def start_job(self, job: Job, recorder: JobRecorder, start: StartJob) -> None:
        known = self.jobs.get(job.job_id)
        if known is not None and known.status not in FINAL_STATES:
            raise ConfigError(f"job_id={job.job_id!r} is taken and {known.status}; cancel it to resume it.")
        if self.folded_by is not None and not job.evaluate_only:
            raise ConfigError(
                f"job {self.folded_by} (update_space='fold') has changed the base weights, and a job starts from "
                "the model as it was loaded: call llm.restore_base(run) first, or load what run.save_merged() wrote."
            )
        if job.space == "fold" and job.first_step:
            self.folded_by = job.job_id  # resuming folds again what the log says was folded
        self.jobs[job.job_id] = job
        self.recorders[job.job_id] = recorder
        self.queue.append(job.job_id)
        self._commands.before.append(start)

    @property
    def active(self) -> Job | None:
        return self.jobs[self.queue[0]] if self.queue else None

    @property
    def exclusive(self) -> Job | None:
        """The job that owns the engine (update space `fold`), from its start to its end."""
        return next((self.jobs[i] for i in self.queue if self.jobs[i].space == "fold"), None)

    def has_work(self) -> bool:
        """Whether the engine loop must keep stepping for training."""
        return bool(self.queue or self._commands)

    def finish_early(self, job_id: str, *, cancel: bool) -> None:
        """Stop a job at the next group boundary: evaluate and publish first, or (cancel) drop what has not run yet."""
        job = self.jobs[job_id]
        if job.status in FINAL_STATES:
            return
        if cancel:
            self._end(job, CANCELLED)
        else:
            job.finish_requested = True

    def request_restore(self, job_id: str) -> None:
        """Ask the workers to bring the original base weights back (after a `fold` job)."""
        if (job := self.exclusive) is not None:
            raise ConfigError(f"job {job.job_id} is {job.status} and writes the base: wait for it or cancel it first.")
        self.folded_by = None
        self._commands.before.append(StopJob(job_id, restore_base=True))
        self.folds_since_reset = True

    # --- scheduling -----------------------------------------------------------------------------------------------

    def offer(self, capacity: Capacity, *, engine_is_empty: bool) -> list[Member]:
        """Members to hand to vLLM's scheduler for this step, pairs together, one probe after another."""
        if not self._open_next():
            return []
        assert self.group is not None
        units, members = self.group.units()
        count = admit(units, capacity, engine_is_empty=engine_is_empty)
        offered = [m for unit in members[:count] for m in unit]
        offered.sort(key=lambda m: (m.probe, m.row))  # equal adapters side by side: one GEMM a run
        self.group.start(offered)
        return offered

    def _open_next(self) -> bool:
        """Make sure a group with pending members is open; false when there is nothing to do."""
        if self.group is None:
            job = self.active
            if job is None or job.ending or self.recorders[job.job_id].waiting:
                return False
            job.status = RUNNING
            work = job.next_work()
            if work is None:
                if job.all_issued and job.outstanding == 0:
                    self._end(job, SUCCEEDED)
                return False
            self._open_group(job, work)
        assert self.group is not None
        if self.group.wave_done and not self.group.done:
            self._open_wave(self.group)
        return bool(self.group.pending)

    def _open_group(self, job: Job, work: Work) -> None:
        self._group_count += 1
        group_id = f"zo-{job.job_id}-{self._group_count}"
        if job.space == "fold" and work.learning_rate is not None and job.fold_due(work):
            self._fold(job, work.plan.step)
        self.group = PerturbationGroup(
            group_id, job.job_id, work.plan, work.examples, work.learning_rate, self.slots.num_slots, self.block_size
        )
        self._work[group_id] = (job, work)
        self._commands.before.append(OpenGroup(group_id, job.job_id, work.plan, work.examples))

    def _fold(self, job: Job, step: int) -> None:
        self._commands.before.append(Fold(job.job_id, fold_key(job.config.seed, step)))
        self.folds_since_reset = True
        self.folded_by = job.job_id

    def _open_wave(self, group: PerturbationGroup) -> None:
        self.slots.release(group.group_id)
        placement = group.open_wave(self.slots.free)
        for probe, slot in placement.items():
            self.slots.acquire(slot, group.group_id, pins=len(group.rows))
            self._commands.before.append(Materialise(slot, group.group_id, probe))

    def put_back(self, member: Member) -> None:
        if self.group is not None and member.group_id == self.group.group_id:
            self.group.put_back(member)

    def score(self, member: Member, num_computed_tokens: int, *, last_chunk: bool) -> None:
        """A member has tokens in this step. With its last chunk it stops pinning its slot."""
        self._commands.members.append(
            ScoreMember(member.req_id, member.group_id, member.probe, member.row, num_computed_tokens)
        )
        if last_chunk:
            assert self.group is not None and self.group.group_id == member.group_id
            self.group.finish(member)
            self.slots.unpin(member.slot)

    def take_commands(self) -> ZOCommands:
        """Close the group if its last member is scheduled, and hand over everything collected for this step."""
        if self.group is not None and self.group.done:
            self._close(self.group)
        commands, self._commands = self._commands, ZOCommands()
        return commands

    def _close(self, group: PerturbationGroup) -> None:
        job, work = self._work[group.group_id]
        self._commands.after.append(CloseGroup(group.group_id, group.learning_rate))
        self.slots.release(group.group_id)
        self.group = None
        if work.last_of_evaluation and job.space == "bank" and not job.evaluate_only:
            self._publish(job, work.plan.step)
        interval = job.config.checkpoint_interval
        if work.learning_rate is not None and interval and job.step % interval == 0 and job.space == "bank":
            self._commands.after.append(Snapshot(job.job_id, str(job.directory / "snapshot.safetensors"), job.step))

    def _publish(self, job: Job, version: int) -> None:
        if version not in job.published:
            job.published.add(version)
            self._commands.after.append(Publish(job.job_id, version, str(version_path(job.directory, version))))

    def drop_group(self) -> None:
        """Forget the open group after its members were aborted (pause, shutdown). The same work runs again later."""
        if self.group is None:
            return
        group, self.group = self.group, None
        job, work = self._work.pop(group.group_id)
        self.slots.release(group.group_id, force=True)
        self._commands.before.append(DropGroup(group.group_id))
        job.take_back(work)

    # --- results --------------------------------------------------------------------------------------------------

    def on_results(self, results: ZOResults) -> None:
        for job_id, modules in results.modules.items():
            self._open_log(self.jobs[job_id], modules)
        for result in results.groups:  # before failures: the update of a group that answered is in the state
            job, work = self._work.pop(result.group_id, (None, None))
            if job is not None and work is not None and job.status not in FINAL_STATES:
                self._on_group(job, work, result)
        for failure in results.failures:
            if (job := self.jobs.get(failure.job_id)) and job.status not in FINAL_STATES:
                self._finish(job, FAILED, failure.message)

    def _open_log(self, job: Job, modules: Sequence[ModuleShape]) -> None:
        if job.status in FINAL_STATES:  # cancelled while the workers were setting it up
            return
        try:
            self.recorders[job.job_id].open(modules)
        except ZOError as error:  # another job's log, a full disk: this job ends, the engine does not
            self._finish(job, FAILED, str(error))

    def _on_group(self, job: Job, work: Work, result: GroupResult) -> None:
        recorder = self.recorders[job.job_id]
        if work.learning_rate is None:
            if (record := job.on_evaluation_result(work, result)) is not None:
                recorder.metrics(record)
                self._keep_best(job)
        else:
            recorder.metrics(job.on_train_result(work, result))
            recorder.step(work.plan.step, work.learning_rate, result.coefficients, result.finite)
        if job.ending is not None:
            self._end(job, *job.ending)
        elif recorder.error is not None:
            self._end(job, FAILED, str(recorder.error))
        elif (why := job.divergence()) is not None:
            self._end(job, FAILED, f"{why}; lower the learning rate. The state up to the best evaluation is kept.")

    def _keep_best(self, job: Job) -> None:
        """Keep the newest published version, and the best where it is to be given back; forget the rest."""
        keep = {max(job.published, default=0)}
        if job.config.keep_best:
            keep.add((job.best() or {}).get("step", 0))
        for version in sorted(job.published - keep):
            self._commands.before.append(Unpublish(job.job_id, version))
            job.published.discard(version)

    def _end(self, job: Job, status: str, error: str | None = None) -> None:
        """End a job; with groups in flight, when their results are in: their updates are made, the log needs them."""
        self._drop_group_of(job)
        if job.outstanding:
            job.ending = (status, error)
        else:
            self._finish(job, status, error)

    def _drop_group_of(self, job: Job) -> None:
        if self.group is not None and self.group.job_id == job.job_id:
            self.drop_group()

    def _finish(self, job: Job, status: str, error: str | None = None) -> None:
        self._drop_group_of(job)
        recorder = self.recorders[job.job_id]
        recorder.close()
        if status == SUCCEEDED and recorder.error is not None:  # its last steps are in no log
            status, error = FAILED, str(recorder.error)
        job.status, job.error = status, error
        if job.space == "bank" and not job.validation and job.recorded > 0:
            self._publish_last(job)
        elif job.space == "fold" and job.unfolded and not recorder.waiting:
            self._fold(job, job.recorded)
        self._commands.before.append(StopJob(job.job_id))
        self.queue.remove(job.job_id)
        recorder.summarise(job.summary())
        job.forget_examples()
        log = logger.error if status == FAILED else logger.info
        log("job %s %s at step %d%s", job.job_id, status, job.recorded, f": {error}" if error else "")

    def _publish_last(self, job: Job) -> None:
        step = job.recorded
        if step not in job.published:
            job.published.add(step)
            self._commands.before.append(Publish(job.job_id, step, str(version_path(job.directory, step))))

    def close(self) -> None:
        """The engine is going down: leave every unfinished job's log complete on disk, so that it can be resumed."""
        for job_id in self.queue:
            self.recorders[job_id].close()
            self.recorders[job_id].summarise(self.jobs[job_id].summary())

    def status(self, job_id: str, since: int = 0) -> dict[str, Any]:
        """Summary and metric records from `since` on; what the front end polls."""
        job = self.jobs.get(job_id)
        if job is None:
            raise ConfigError(f"job_id={job_id!r} is unknown; known jobs: {sorted(self.jobs) or 'none'}.")
        records = self.recorders[job_id].records
        return {**job.summary(), "records": records[since:], "next": len(records)}


def version_path(directory: Path, version: int) -> Path:
    """File of a published version of a job."""
    return directory / f"step-{version}.safetensors"
