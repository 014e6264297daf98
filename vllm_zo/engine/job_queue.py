"""The jobs of an engine: which run, rest or wait for a lane, and which has the base weights. No vLLM here.

Jobs enter a free lane in the order in which they were added; as many run together as there are lanes. A job in update
space `fold` writes the base weights, and so needs the engine to itself. Its turn comes when it is the first that waits
and every lane is free: from then on the engine accepts no request. The job enters when the engine has answered the
requests that it had; jobs behind it wait. After its end they still wait until the base is as it was loaded
(`zo_restore_base`), because a job that trains starts, or goes on, from those weights. Jobs that only evaluate do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_zo.commands import ADAPTER_SCHEME
from vllm_zo.engine.job import Job
from vllm_zo.engine.lane import Lane, enter, make_lanes
from vllm_zo.engine.training_rows import GrowingRows
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.status import JobStatus


class JobQueue:
    """Every job by id, the queue of those that have not ended, and the lanes they run in."""

    def __init__(self, concurrent_jobs: int, slots_per_job: int, block_size: int) -> None:
        self.lanes = make_lanes(concurrent_jobs, slots_per_job, block_size)
        self.jobs: dict[str, Job] = {}
        self.unfinished: list[str] = []
        """Jobs that have not ended, running or not, in the order in which they enter a lane."""
        self.folded_by: str | None = None
        """The job whose folds are in the base weights, until they are restored."""

    def get(self, job_id: str) -> Job:
        """The job of that id. Raises ConfigError: the id is unknown."""
        if (job := self.jobs.get(job_id)) is None:
            raise ConfigError(f"job_id={job_id!r} is unknown; known jobs: {sorted(self.jobs) or 'none'}.")
        return job

    # --- start and end --------------------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        """Put a job at the end of the queue.

        Raises:
            ConfigError: another job of that id has not ended.
        """
        known = self.jobs.get(job.job_id)
        if known is not None and not known.status.ended:
            raise ConfigError(f"job_id={job.job_id!r} is taken and {known.status}; cancel it to resume it.")
        self.jobs[job.job_id] = job
        self.unfinished.append(job.job_id)

    @property
    def exclusive(self) -> Job | None:
        """The `fold` job that has the engine to itself, because its turn has come or it runs; else None."""
        jobs = [self.jobs[job_id] for job_id in self.unfinished]
        if (owner := next((job for job in jobs if job.space == "fold" and job.begun), None)) is not None:
            return owner
        first = next((job for job in jobs if self._may_enter(job)), None)
        lanes_free = all(lane.job is None for lane in self.lanes)
        return first if first is not None and first.space == "fold" and lanes_free else None

    @property
    def base_owner(self) -> str | None:
        """The job whose weights the base has or is about to have."""
        owner = self.exclusive
        return self.folded_by if owner is None else owner.job_id

    def remove(self, job: Job) -> None:
        """Take a job that has ended out of its lane and the queue; `get` still finds it."""
        if (lane := self.lane_of(job)) is not None:
            lane.leave()
        self.unfinished.remove(job.job_id)

    def drop(self, job_id: str) -> None:
        """Forget a job that has ended.

        Raises:
            ConfigError: the job is unknown, has not ended, or its weights are in the base.
        """
        job = self.get(job_id)
        if not job.status.ended:
            raise ConfigError(f"job {job_id} is {job.status}: only a job that has ended can be forgotten.")
        if job_id == self.folded_by:
            raise ConfigError(f"job {job_id}: its weights are in the base; restore the base first.")
        del self.jobs[job_id]

    # --- running, resting, waiting --------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether a job runs or may enter a lane, so that the engine must keep stepping."""
        return (
            any(lane.job is not None and lane.job.moves for lane in self.lanes)
            or next(self._entrants(), None) is not None
        )

    def waits(self, tokens: int) -> bool:
        """Whether every job with a lane can only wait, and no other may enter. Args: tokens: see `Lane.waits`."""
        busy = [lane for lane in self.lanes if lane.job is not None]
        if not busy or not all(lane.waits(tokens) for lane in busy):
            return False
        return len(busy) == len(self.lanes) or next(self._entrants(), None) is None

    def entering(self, *, serving: bool) -> Iterator[Job]:
        """Give free lanes to jobs that wait, one after another.

        Args:
            serving: the engine has unfinished requests.
        """
        # A copy: a job whose files cannot be read leaves `unfinished` while the caller handles it.
        for job in list(self._entrants()):
            if (job.space == "fold" and serving) or not enter(self.lanes, job):
                return
            yield job

    def _entrants(self) -> Iterator[Job]:
        """Jobs that may enter a lane as soon as there is one, in their order, up to the first `fold` job."""
        owner = self.exclusive
        for job_id in self.unfinished:
            job = self.jobs[job_id]
            if not self._may_enter(job) or owner not in (None, job):
                continue
            if job.space != "fold":
                yield job
                continue
            if job is owner:
                yield job
            # Not even when it cannot enter yet: jobs behind it would keep the lanes occupied for ever.
            return

    def _may_enter(self, job: Job) -> bool:
        """Whether the job waits for a lane only, and not for the base to be as it was loaded."""
        return job.status == JobStatus.QUEUED and (self.folded_by is None or job.evaluate_only)

    def lane_of(self, job: Job) -> Lane | None:
        return next((lane for lane in self.lanes if lane.job is job), None)

    def pause(self, job_id: str) -> None:
        """Let a job rest at the next group boundary. It keeps its state and gives its lane away.

        Raises:
            ConfigError: the job is unknown or has ended, or it is a `fold` job that has begun: the engine, which
                answers no requests meanwhile, would wait for it.
        """
        job = self.get(job_id)
        if job.status.ended:
            raise ConfigError(f"job {job_id} is {job.status}: there is nothing to pause.")
        if job.space == "fold" and job.begun:
            raise ConfigError(f"job {job_id} (update_space='fold') has changed the base: let it end, or cancel it.")
        job.pause()
        self.rest(job)

    def rest(self, job: Job) -> None:
        """Let a pausing job rest, if none of its groups is open or in flight."""
        if job.may_rest:
            if (lane := self.lane_of(job)) is not None:
                lane.leave()
            job.rest()

    def resume(self, job_id: str) -> None:
        """Let a paused job go on; it enters a lane behind the jobs that wait.

        Raises:
            ConfigError: the job is unknown or not paused.
        """
        job = self.get(job_id)
        if job.status not in (JobStatus.PAUSING, JobStatus.PAUSED):
            raise ConfigError(f"job {job_id} is {job.status}, not paused.")
        if job.status == JobStatus.PAUSED:
            self.unfinished.remove(job_id)
            self.unfinished.append(job_id)
        job.resume()

    def growing(self, job_id: str) -> GrowingRows:
        """The rows of a continual job that has not ended. Raises ConfigError: it is none."""
        job = self.get(job_id)
        if not isinstance(job.rows, GrowingRows):
            raise ConfigError(f"job {job_id} has the rows that it began with; only continual=True lets them grow.")
        if job.status.ended:
            raise ConfigError(f"job {job_id} is {job.status}: it learns no more.")
        return job.rows

    # --- questions ------------------------------------------------------------------------------------------------

    def check_published(self, name: str) -> None:
        """Raise ConfigError unless `name` (`<job_id>/<step>`) is a published version of a job of this engine."""
        job_id, _, version = name.rpartition("/")
        job = self.jobs.get(job_id)
        if job is None or version not in map(str, job.versions.steps):
            have = job.versions.steps if job is not None else f"of jobs {sorted(self.jobs)}"
            raise ConfigError(f"{ADAPTER_SCHEME}{name} is not published on this engine; published: {have}.")

    def status(self, job_id: str, since: int = 0) -> dict[str, Any]:
        """Summary and metric records from number `since` on, for the front end to poll.

        Raises:
            ConfigError: the job is unknown.
        """
        job = self.get(job_id)
        records, total = job.recorder.records(since)
        return {**job.summary(), "records": records, "next": total}

    def stats(self) -> dict[str, Any]:
        """For monitoring: the slots that running jobs hold, and every unfinished job's status, step and pace."""
        held = {lane.job.job_id: len(lane.slots) for lane in self.lanes if lane.job is not None}
        return {
            "base_owner": self.base_owner,
            "slots": {"total": sum(len(lane.slots) for lane in self.lanes), "in_use": sum(held.values())},
            "jobs": {job_id: {**self.jobs[job_id].stats(), "slots": held.get(job_id, 0)} for job_id in self.unfinished},
        }

    def close(self) -> None:
        """Complete the log of every unfinished job on disk before the engine ends, so that the job can be resumed."""
        for job_id in self.unfinished:
            job = self.jobs[job_id]
            job.recorder.close()
            job.recorder.summarise(job.summary())
