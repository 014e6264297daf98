"""The training side of the scheduler: which groups are open, and what the workers are told. No vLLM here.

One engine step, in the order the scheduler calls it:

    offer(capacity)            members that may start now; opens groups and probe waves where there is room
    take_commands()            what rides on the SchedulerOutput: materialise, score, close
    on_results(results)        losses and applied coefficients come back: metrics, seed log, next phase
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vllm_zo.checkpoint.replay import fold_key
from vllm_zo.commands import (
    CloseGroup,
    Command,
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
    ZOCommands,
    ZOResults,
)
from vllm_zo.engine.admission import Capacity, admit
from vllm_zo.engine.group import Member, PerturbationGroup
from vllm_zo.engine.job import CANCELLED, FAILED, FINAL_STATES, RUNNING, SUCCEEDED, Job, Work
from vllm_zo.engine.job_table import JobTable
from vllm_zo.engine.lane import Lane, by_need
from vllm_zo.engine.recorder import JobRecorder
from vllm_zo.engine.rewarder import Cells
from vllm_zo.errors import ConfigError, RewardError, ZOError
from vllm_zo.methods.base import ModuleShape

logger = logging.getLogger("vllm.zo")


class Controller:
    """Owns the open groups and what the workers are told about them. Called from the engine's step loop only."""

    def __init__(self, slots_per_job: int, block_size: int, concurrent_jobs: int = 1) -> None:
        self.table = JobTable(concurrent_jobs, slots_per_job)
        self.block_size = block_size
        self._work: dict[str, tuple[Job, Work]] = {}
        self._rewards: dict[str, Cells] = {}
        """Of closed groups whose members generated, until their results are back."""
        self._commands = ZOCommands()
        self._group_count = 0
        self.workers_run_members = False
        """Whether the workers can run members alone; they say so with the modules of the first job."""
        self.folds_since_reset = False
        """A fold was issued: cached KV of the base is stale. The scheduler resets its prefix cache and this flag."""

    # --- jobs -----------------------------------------------------------------------------------------------------

    def start_job(self, job: Job, recorder: JobRecorder, start: StartJob) -> None:
        """Queue a job; raises ConfigError as `JobTable.add` does."""
        self.table.add(job, recorder)
        self._commands.before.append(start)

    def has_work(self) -> bool:
        """Whether the engine loop must keep stepping for training."""
        return bool(self._commands) or self.table.has_work()

    def finish_early(self, job_id: str, *, cancel: bool) -> None:
        """Stop a job at the next group boundary: evaluate and publish first, or (cancel) drop what has not run yet."""
        job = self.table.get(job_id)
        if job.status in FINAL_STATES:
            return
        if cancel:
            self._end(job, CANCELLED)
        else:
            job.finish_requested = True

    def request_restore(self, job_id: str) -> None:
        """Ask the workers to bring the original base weights back (after a `fold` job)."""
        if (job := self.table.exclusive) is not None:
            raise ConfigError(f"job {job.job_id} is {job.status} and writes the base: wait for it or cancel it first.")
        self.table.folded_by = None
        self._commands.before.append(StopJob(job_id, restore_base=True))
        self.folds_since_reset = True

    # --- scheduling -----------------------------------------------------------------------------------------------

    def offer(self, capacity: Capacity, *, engine_is_empty: bool) -> list[Member]:
        """Members to hand to vLLM's scheduler for this step, pairs together, one probe after another.

        The lane that was given the fewest tokens chooses first; what it leaves is the next one's.
        """
        self._collect_rewards()
        self.table.fill_lanes()
        offered: list[Member] = []
        for lane in by_need(self.table.lanes):
            if (group := self._open_group(lane)) is None:
                continue
            units, members = group.units()
            count = admit(units, capacity, engine_is_empty=engine_is_empty and not offered)
            capacity = capacity.less(units[:count])
            started = [m for unit in members[:count] for m in unit]
            started.sort(key=lambda m: (m.probe, m.row))  # equal adapters side by side: one GEMM a run
            group.start(started)
            offered += started
        return offered

    def _open_group(self, lane: Lane) -> PerturbationGroup | None:
        """The lane's group, opened if need be; None when it has no member to start now."""
        if lane.group is None:
            assert lane.job is not None
            job = lane.job
            if job.status != RUNNING or job.ending or self.table.recorders[job.job_id].waiting:
                return None
            work = job.next_work()
            if work is None:
                if job.all_issued and job.outstanding == 0:
                    self._end(job, SUCCEEDED)
                return None
            lane.group = self._make_group(lane, job, work)
        if lane.group.wave_done and not lane.group.done:
            self._open_wave(lane, lane.group)
        return lane.group if lane.group.pending else None

    def _make_group(self, lane: Lane, job: Job, work: Work) -> PerturbationGroup:
        self._group_count += 1
        group_id = f"zo-{job.job_id}-{self._group_count}"
        if job.space == "fold" and work.learning_rate is not None and job.fold_due(work):
            self._fold(job, work.plan.step)
        self._work[group_id] = (job, work)
        if work.learning_rate is not None:
            job.meter.open(group_id)
        # What a reward reads of an example is not the workers' business.
        shown = tuple(e if e.columns is None else replace(e, columns=None) for e in work.examples)
        self._commands.before.append(OpenGroup(group_id, job.job_id, work.plan, shown))
        return PerturbationGroup(
            group_id,
            job.job_id,
            work.plan,
            work.examples,
            work.learning_rate,
            len(lane.slots),
            self.block_size,
            work.seeds,
            job.config.method.coordinates.in_place,
        )

    def _fold(self, job: Job, step: int) -> None:
        self._commands.before.append(Fold(job.job_id, fold_key(job.config.seed, step)))
        self.folds_since_reset = True
        self.table.folded_by = job.job_id

    def _open_wave(self, lane: Lane, group: PerturbationGroup) -> None:
        lane.slots.release(group.group_id)
        placement = group.open_wave(lane.slots.free)
        for probe, slot in placement.items():
            lane.slots.acquire(slot, group.group_id, pins=len(group.rows))
            self._commands.before.append(Materialise(slot, group.group_id, probe))

    @property
    def open_groups(self) -> set[str]:
        return {lane.group.group_id for lane in self.table.lanes if lane.group is not None}

    def put_back(self, member: Member) -> None:
        if (lane := self.table.lane_with(member.group_id)) is not None:
            assert lane.group is not None
            lane.group.put_back(member)

    def score(self, member: Member, num_computed_tokens: int, num_tokens: int, *, last_chunk: bool) -> None:
        """A member has `num_tokens` tokens in this step. With its last chunk it stops pinning its slot; one that
        generates goes on."""
        lane = self.table.lane_with(member.group_id)
        assert lane is not None and lane.group is not None
        lane.tokens += num_tokens
        if member.generation is not None:
            self._commands.generates = True
            return
        self._commands.members.append(
            ScoreMember(member.req_id, member.group_id, member.probe, member.row, num_computed_tokens)
        )
        if last_chunk:
            lane.group.finish(member)
            lane.slots.unpin(member.slot)

    @property
    def can_run_alone(self) -> bool:
        """Whether all members that may be offered can be run without vLLM's requests."""
        generating = any(lane.job is not None and lane.job.rewarder is not None for lane in self.table.lanes)
        return self.workers_run_members and not generating

    def run_alone(self, members: Sequence[Member]) -> None:
        """Members run whole in this step, in a forward of the workers' own."""
        for member in members:
            self.score(member, 0, len(member.token_ids), last_chunk=True)
        self._commands.alone = True

    def generated(self, member: Member, token_ids: Sequence[int], *, finished: bool) -> None:
        """A member has written `token_ids`. When all of its group have finished, their rewards are asked for."""
        member.output += token_ids
        lane = self.table.lane_with(member.group_id)
        if not finished or lane is None:
            return
        assert lane.group is not None and lane.job is not None and lane.job.rewarder is not None
        lane.group.finish(member)
        lane.slots.unpin(member.slot)
        lane.job.tokens += len(member.output)
        if lane.group.done:
            lane.group.scoring = lane.job.rewarder.start(lane.group)

    def _collect_rewards(self) -> None:
        """Close groups whose rewards are there. A reward that fails, or takes too long, fails its job."""
        for lane in self.table.lanes:
            if lane.group is None or lane.group.scoring is None:
                continue
            assert lane.job is not None
            try:
                cells = lane.group.scoring.outcome()
            except RewardError as error:
                self._end(lane.job, FAILED, str(error))
                continue
            if cells is not None:
                self._rewards[lane.group.group_id] = cells
                self._close(lane, lane.group, self._commands.before, cells)

    def wait_for_rewards(self, seconds: float) -> None:
        """Let the threads work that compute rewards, if there are any: the engine has nothing else to do."""
        scorings = [lane.group.scoring for lane in self.table.lanes if lane.group is not None and lane.group.scoring]
        if scorings:
            scorings[0].wait(seconds)

    def take_commands(self) -> ZOCommands:
        """Close groups whose last member is scheduled, and hand over everything collected for this step."""
        for lane in self.table.lanes:
            if lane.group is not None and lane.group.done and not lane.group.generates:
                self._close(lane, lane.group, self._commands.after)
        commands, self._commands = self._commands, ZOCommands()
        return commands

    def _close(self, lane: Lane, group: PerturbationGroup, commands: list[Command], cells: Cells | None = None) -> None:
        """Close a group: behind the forward that scores it; one with rewards before any forward of its successor."""
        job, work = self._work[group.group_id]
        commands.append(CloseGroup(group.group_id, group.learning_rate, cells))
        lane.slots.release(group.group_id)
        lane.group = None
        steps = work.plan.step + (work.learning_rate is not None)
        if job.publish_due(work):
            self._publish(job, steps, commands)
        if job.snapshot_due(work):
            commands.append(Snapshot(job.job_id, str(job.directory / "snapshot.safetensors"), steps))

    def _publish(self, job: Job, version: int, commands: list[Command]) -> None:
        if version not in job.published:
            job.published.add(version)
            commands.append(Publish(job.job_id, version, str(version_path(job.directory, version))))

    def drop_groups(self) -> None:
        """Forget the open groups after their members were aborted (pause, shutdown). Their work runs again later."""
        for lane in self.table.lanes:
            self._drop_group(lane)

    def _drop_group(self, lane: Lane) -> None:
        if lane.group is None:
            return
        group, lane.group = lane.group, None
        job, work = self._work.pop(group.group_id)
        lane.slots.release(group.group_id, force=True)
        job.meter.drop(group.group_id)
        self._commands.before.append(DropGroup(group.group_id))
        job.take_back(work)
        self.table.rest(job)

    # --- results --------------------------------------------------------------------------------------------------

    def on_results(self, results: ZOResults) -> None:
        for job_id, modules in results.modules.items():
            self.workers_run_members = results.members_alone
            self._open_log(self.table.jobs[job_id], modules)
        for result in results.groups:  # before failures: the update of a group that answered is in the state
            job, work = self._work.pop(result.group_id, (None, None))
            if (cells := self._rewards.pop(result.group_id, None)) is not None and work is not None:
                result = replace(result, losses=_unshaped_losses(cells, len(work.examples)))
            if job is not None and work is not None and job.status not in FINAL_STATES:
                self._on_group(job, work, result)
        for failure in results.failures:
            if (job := self.table.jobs.get(failure.job_id)) and job.status not in FINAL_STATES:
                # What could not be written cannot be served.
                job.published = {v for v in job.published if version_path(job.directory, v).exists()}
                self._finish(job, FAILED, failure.message)

    def _open_log(self, job: Job, modules: Sequence[ModuleShape]) -> None:
        if job.status in FINAL_STATES:  # cancelled while the workers were setting it up
            return
        try:
            self.table.recorders[job.job_id].open(modules)
        except ZOError as error:  # another job's log, a full disk: this job ends, the engine does not
            self._finish(job, FAILED, str(error))

    def _on_group(self, job: Job, work: Work, result: GroupResult) -> None:
        recorder = self.table.recorders[job.job_id]
        if work.learning_rate is None:
            if (record := job.on_evaluation_result(work, result)) is not None:
                recorder.metrics(record)
        else:
            job.meter.close(result.group_id)
            if (record := job.on_train_result(work, result)) is not None:
                recorder.metrics(record)
                recorder.step(work.plan.step, work.learning_rate, result.coefficients, result.finite)
        if job.ending is not None:
            self._end(job, *job.ending)
        elif recorder.error is not None:
            self._end(job, FAILED, str(recorder.error))
        elif (why := job.divergence()) is not None:
            self._end(job, FAILED, f"{why}; lower the learning rate. The state up to the best evaluation is kept.")
        else:
            self.table.rest(job)

    def _end(self, job: Job, status: str, error: str | None = None) -> None:
        """End a job; with groups in flight, when their results are in: their updates are made, the log needs them."""
        if (lane := self.table.lane_of(job)) is not None:
            self._drop_group(lane)
        if job.outstanding:
            job.ending = (status, error)
        else:
            self._finish(job, status, error)

    def _finish(self, job: Job, status: str, error: str | None = None) -> None:
        if (lane := self.table.lane_of(job)) is not None:
            self._drop_group(lane)
        recorder = self.table.recorders[job.job_id]
        recorder.close()
        if status == SUCCEEDED and recorder.error is not None:  # its last steps are in no log
            status, error = FAILED, str(recorder.error)
        job.status, job.error = status, error
        if job.space == "bank" and not job.validation and job.recorded > 0:
            self._publish(job, job.recorded, self._commands.before)
        elif job.space == "fold" and job.unfolded and not recorder.waiting:
            self._fold(job, job.recorded)
        self._commands.before.append(StopJob(job.job_id))
        self.table.remove(job)
        recorder.summarise(job.summary())
        recorder.forget()
        job.forget_examples()
        log = logger.error if status == FAILED else logger.info
        log("job %s %s at step %d%s", job.job_id, status, job.recorded, f": {error}" if error else "")


def _unshaped_losses(cells: Cells, examples: int) -> list[list[float]]:
    """(probes, examples) minus the mean reward of each example's samples: what records show, whatever is optimised."""
    samples = len(cells[0]) // examples
    return [[-sum(row[e * samples : (e + 1) * samples]) / samples for e in range(examples)] for row in cells]


def version_path(directory: Path, version: int) -> Path:
    """File of a published version of a job."""
    return directory / f"step-{version}.safetensors"
