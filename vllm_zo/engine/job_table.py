"""The jobs of an engine: which may start, which run, rest or wait, and who has the base weights. No vLLM here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_zo.commands import ADAPTER_SCHEME
from vllm_zo.engine.job import FINAL_STATES, PAUSED, PAUSING, QUEUED, RUNNING, Job
from vllm_zo.engine.lane import Lane, enter, make_lanes
from vllm_zo.engine.recorder import JobRecorder
from vllm_zo.errors import ConfigError


class JobTable:
    """Every job by id, the queue of those that have not ended, and the lanes they run in.

    Jobs enter a free lane in the order they were started; as many run together as there are lanes. A job in update
    space `fold` writes the base weights and is alone, from its start to its end.
    """

    def __init__(self, concurrent_jobs: int, slots_per_job: int) -> None:
        self.lanes = make_lanes(concurrent_jobs, slots_per_job)
        self.jobs: dict[str, Job] = {}
        self.recorders: dict[str, JobRecorder] = {}
        self.queue: list[str] = []
        """Jobs that have not ended, running or not, in the order they are to enter a lane."""
        self.folded_by: str | None = None
        """The job whose folds are in the base weights, until they are restored."""

    def get(self, job_id: str) -> Job:
        if (job := self.jobs.get(job_id)) is None:
            raise ConfigError(f"job_id={job_id!r} is unknown; known jobs: {sorted(self.jobs) or 'none'}.")
        return job

    # --- start and end --------------------------------------------------------------------------------------------

    def add(self, job: Job, recorder: JobRecorder) -> None:
        """Put a job at the end of the queue.

        Raises:
            ConfigError: its id is taken, the base is not as it was loaded, or `fold` and company.
        """
        known = self.jobs.get(job.job_id)
        if known is not None and known.status not in FINAL_STATES:
            raise ConfigError(f"job_id={job.job_id!r} is taken and {known.status}; cancel it to resume it.")
        if not job.evaluate_only:
            self._check_may_train(job)
        if job.space == "fold" and job.first_step:
            self.folded_by = job.job_id  # resuming folds again what the log says was folded
        self.jobs[job.job_id] = job
        self.recorders[job.job_id] = recorder
        self.queue.append(job.job_id)

    def _check_may_train(self, job: Job) -> None:
        if self.folded_by is not None:
            raise ConfigError(
                f"job {self.folded_by} (update_space='fold') has changed the base weights, and a job starts from "
                "the model as it was loaded: call llm.restore_base(run) first, or load what run.save_merged() wrote."
            )
        if (owner := self.exclusive) is not None:
            raise ConfigError(
                f"job {owner.job_id} (update_space='fold') has the engine to itself and is {owner.status}: wait for "
                "it, or cancel it."
            )
        if job.space == "fold" and self.queue:
            raise ConfigError(
                f"update_space='fold' needs the engine to itself, and these jobs have not ended: "
                f"{', '.join(self.queue)}. Wait for them, or train with update_space='bank'."
            )

    @property
    def exclusive(self) -> Job | None:
        """The job that owns the engine (update space `fold`), from its start to its end."""
        return next((self.jobs[i] for i in self.queue if self.jobs[i].space == "fold"), None)

    def remove(self, job: Job) -> None:
        """The job has ended: it leaves its lane and the queue."""
        if (lane := self.lane_of(job)) is not None:
            lane.leave()
        self.queue.remove(job.job_id)

    # --- running, resting, waiting --------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether a job runs, or would if it were asked."""
        return any(lane.job for lane in self.lanes) or next(self._entrants(), None) is not None

    def fill_lanes(self) -> None:
        """Let waiting jobs into free lanes."""
        for job in list(self._entrants()):
            if not enter(self.lanes, job):
                return
            job.status = RUNNING

    def _entrants(self) -> Iterator[Job]:
        """Jobs that wait for a lane and may have one. While a `fold` job is there, nobody but it."""
        for job_id in self.queue:
            job = self.jobs[job_id]
            if job.status == QUEUED and self.exclusive in (None, job):
                yield job

    def lane_of(self, job: Job) -> Lane | None:
        return next((lane for lane in self.lanes if lane.job is job), None)

    def lane_with(self, group_id: str) -> Lane | None:
        """The lane in which a group is open."""
        return next((lane for lane in self.lanes if lane.group is not None and lane.group.group_id == group_id), None)

    def pause(self, job_id: str) -> None:
        """Rest at the next group boundary. The job keeps its state and gives its lane away.

        Raises:
            ConfigError: unknown, or it has ended.
        """
        job = self.get(job_id)
        if job.status in FINAL_STATES:
            raise ConfigError(f"job {job_id} is {job.status}: there is nothing to pause.")
        if job.status != PAUSED:
            job.status = PAUSING
            self.rest(job)

    def rest(self, job: Job) -> None:
        """A pausing job rests once none of its groups is open or in flight."""
        if job.status == PAUSING and not job.outstanding:
            if (lane := self.lane_of(job)) is not None:
                lane.leave()
            job.status = PAUSED

    def resume(self, job_id: str) -> None:
        """Let a paused job go on; it enters a lane behind those that wait.

        Raises:
            ConfigError: unknown, or not paused.
        """
        job = self.get(job_id)
        if job.status not in (PAUSING, PAUSED):
            raise ConfigError(f"job {job_id} is {job.status}, not paused.")
        if job.status == PAUSED:
            self.queue.remove(job_id)
            self.queue.append(job_id)
        job.status = QUEUED if self.lane_of(job) is None else RUNNING

    # --- questions ------------------------------------------------------------------------------------------------

    def check_published(self, name: str) -> None:
        """Raise ConfigError unless `<job_id>/<step>` is a version of a job of this engine."""
        job_id, _, version = name.rpartition("/")
        job = self.jobs.get(job_id)
        if job is None or version not in map(str, job.published):
            have = sorted(job.published) if job is not None else f"of jobs {sorted(self.jobs)}"
            raise ConfigError(f"{ADAPTER_SCHEME}{name} is not published on this engine; published: {have}.")

    def status(self, job_id: str, since: int = 0) -> dict[str, Any]:
        """Summary and metric records from `since` on; what the front end polls."""
        job = self.get(job_id)
        records, total = self.recorders[job_id].records(since)
        return {**job.summary(), "records": records, "next": total}

    def stats(self) -> dict[str, Any]:
        """What monitoring wants to know: slots that running jobs hold, and every unfinished job's place and pace."""
        held = {lane.job.job_id: len(lane.slots) for lane in self.lanes if lane.job is not None}
        return {
            "slots": {"total": sum(len(lane.slots) for lane in self.lanes), "in_use": sum(held.values())},
            "jobs": {job_id: {**self.jobs[job_id].stats(), "slots": held.get(job_id, 0)} for job_id in self.queue},
        }

    def close(self) -> None:
        """The engine is going down: leave every unfinished job's log complete on disk, so that it can be resumed."""
        for job_id in self.queue:
            self.recorders[job_id].close()
            self.recorders[job_id].summarise(self.jobs[job_id].summary())
