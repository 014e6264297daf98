"""Runs a task for every unfinished job, and carries out what clients ask of a job: pause, resume, cancel.

The store owns a job's status. Every change goes through `Store.move_job`, which looks at the status before: of two
clients at once, or of a client and an answer of the engine, the second finds the status that the first has left. A
change that also needs a call to the engine (start, pause, resume, cancel) holds the job's lock over both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from contextvars import Context
from typing import Any
from weakref import WeakValueDictionary

from vllm_zo.entrypoints.server.http.errors import APIError, disk_error, when_there_is_room
from vllm_zo.entrypoints.server.http.events import EventHub
from vllm_zo.entrypoints.server.http.schemas import event, now
from vllm_zo.entrypoints.server.jobs.follow import Follower, paused_at
from vllm_zo.entrypoints.server.jobs.outcome import Outcome, log_position
from vllm_zo.entrypoints.server.jobs.prepare import Preparer
from vllm_zo.entrypoints.server.jobs.rollouts import ServedRollouts
from vllm_zo.entrypoints.server.jobs.wandb_run import observer_for
from vllm_zo.entrypoints.server.keys.current import OPERATOR, acting_for
from vllm_zo.entrypoints.server.keys.limits import Quotas, today
from vllm_zo.entrypoints.server.models.vllm_models import Serving
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.errors import ConfigError, ZOError
from vllm_zo.jobs.status import UNFINISHED, JobStatus

logger = logging.getLogger("vllm.zo.server")

ENGINE_DIED = ("The engine process died", "engine_died")
"""Message and code of a job's error."""
MAX_FRUITLESS_STARTS, FRUITLESS_S = 2, 30
"""The server gives a job up after so many starts in a row that brought no step and no evaluation although each lasted
FRUITLESS_S seconds."""
POISONED = (
    f"The server ended {MAX_FRUITLESS_STARTS} times while this job ran and had brought neither a step nor an "
    "evaluation: it may kill or hang the engine, and is not started again. Create it anew with less to do in a step.",
    "poisoned",
)
CANCEL_WAIT_S = 20.0
"""How long `cancel` waits for the groups in flight before it answers."""


class JobRunner:
    """Belongs to one event loop. The engine decides which job runs when: it has every validated job in its queue."""

    def __init__(
        self,
        preparer: Preparer,
        outcome: Outcome,
        hub: EventHub,
        serving: Serving,
        rollouts: ServedRollouts,
        quotas: Quotas,
        on_end: Callable[[str], None] = lambda job_id: None,
    ) -> None:
        """
        Args:
            on_end: called with the id of each job whose task has ended.
        """
        self.preparer, self._rollouts, self._quotas = preparer, rollouts, quotas
        self._outcome, self._store, self._client = outcome, outcome.store, outcome.client
        self._hub, self._serving, self._on_end = hub, serving, on_end
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Locks that a coroutine holds or waits for. Others vanish: a client may name any number of ids of no job."""
        self._validating: dict[str, tuple[str, asyncio.Event]] = {}
        """Of each job that the engine does not have yet: its owner, and what is set once the engine has it, or it has
        ended. In the order in which the jobs were created."""
        self._exclusive: set[str] = set()
        """Jobs with a task that need the engine to themselves."""
        self._other_base: set[str] = set()
        """Unfinished jobs of another base model. They wait for a server with that model; this one never gets them."""
        self._stopping = False

    def submit(self, job: JobRecord) -> None:
        """Take on a new job whose record is written."""
        self._spawn(job)

    async def resume_all(self) -> None:
        """Give every unfinished job to the engine again. Call it after a start of the server, before it serves."""
        for job in await asyncio.to_thread(self._store.jobs, UNFINISHED):
            if job.base != self._outcome.names.base:
                await self._let_wait(job)
                continue
            try:
                # The engine never had a validating job: its task prepares it again.
                if job.status != JobStatus.VALIDATING:
                    job = await self._start_again(job)
            except Exception as error:  # as in `_attend`: one job must not keep the server from starting
                await self._on_error(job, error)
            else:
                if not job.status.ended:
                    self._spawn(job)

    async def _let_wait(self, job: JobRecord) -> None:
        if job.cancelling:  # a client has got this answer from the server before
            await self._follower(job).end(JobStatus.CANCELLED, "")
            return
        why = (
            f"The job waits: it belongs to a base model with fingerprint {job.base}, and this server's has "
            f"{self._outcome.names.base}. It goes on when the server is started with its model"
        )
        logger.warning("job %s: %s", job.id, why)
        self._other_base.add(job.id)
        rests = job.status in (JobStatus.PAUSING, JobStatus.PAUSED)
        status = JobStatus.PAUSED if rests else JobStatus.QUEUED
        if job.status != JobStatus.VALIDATING:
            await self._move(job.id, UNFINISHED, status, event(why, "warn"), estimated_finish=None)

    async def _start_again(self, job: JobRecord) -> JobRecord:
        follower = self._follower(job)
        # First of all: the engine goes on behind its log, and never tells the steps in it again.
        job = await asyncio.to_thread(follower.catch_up)
        if job.cancelling:
            await follower.end(JobStatus.CANCELLED, "")
            return follower.job
        job = await self._count_fruitless_start(job)
        if job.fruitless_starts >= MAX_FRUITLESS_STARTS:
            await follower.end(JobStatus.FAILED, *POISONED)
            return follower.job
        status, events = JobStatus.PAUSED, []
        if job.status in (JobStatus.QUEUED, JobStatus.RUNNING):
            status = JobStatus.QUEUED
            if job.status == JobStatus.RUNNING:
                steps = await asyncio.to_thread(log_position, self._outcome.job_dir(job))
                events = [event(f"The server was restarted; the job goes on from step {steps}")]
        moved = await asyncio.to_thread(self._store.move_job, job.id, UNFINISHED, status, *events, handed_over_at=now())
        assert moved is not None, "no client is served yet"
        # The record before the engine: a server that is killed in between finds a queued job, and starts it again.
        await self._start(moved)
        return moved

    async def _count_fruitless_start(self, job: JobRecord) -> JobRecord:
        """Count a start of the job that brought no step and no evaluation before the server ended: the job may be the
        reason for that end.

        A job that began less than `FRUITLESS_S` before this start is not counted: it had no time for a step.
        """
        if job.status != JobStatus.RUNNING or now() - job.handed_over_at < FRUITLESS_S:
            return job
        brought = await asyncio.to_thread(log_position, self._outcome.job_dir(job)) + len(job.evaluations)
        fruitless = job.fruitless_starts + 1 if brought <= job.brought_before else 0
        return await asyncio.to_thread(
            self._store.change_job, job.id, fruitless_starts=fruitless, brought_before=brought
        )

    # --- what clients ask for -----------------------------------------------------------------------------------------

    async def pause(self, job_id: str, why: str = "Pausing after the group that is running") -> JobRecord:
        """Stop a job at its next group boundary; a job that waits for a lane stops at once.

        Args:
            why: the message of the job's event.

        Raises:
            APIError: 404, there is no such job; 409, it cannot be paused now.
        """
        async with self._lock(job_id):
            job = await asyncio.to_thread(self._store.job, job_id)
            _check_not_cancelling(job)
            if job.exclusive and job.status == JobStatus.RUNNING:
                raise APIError(
                    409, f"job {job_id} (update_space='fold') has changed the base: let it end, or cancel it."
                )
            pausing = event(why)
            # Before the engine is asked: the follower takes its "paused" only for a job that is pausing, and a full
            # disk refuses here, while nothing has happened yet.
            moved = await self._move(job_id, {JobStatus.QUEUED, JobStatus.RUNNING}, JobStatus.PAUSING, pausing)
            if moved is None:
                raise APIError(409, f"job {job_id} is {job.status}: only a queued or running job can be paused.")
            if job_id in self._other_base:
                await self._move(job_id, {JobStatus.PAUSING}, JobStatus.PAUSED, paused_at(job.step))
                return await asyncio.to_thread(self._store.job, job_id)
            try:
                status = await self._client.call("zo_pause", job_id)
            except ConfigError as error:  # it has ended, and its follower has not polled since
                await self._move(job_id, {JobStatus.PAUSING}, job.status)
                raise APIError(409, str(error)) from error
            if status == JobStatus.PAUSED:  # at once: none of its groups was in flight
                await self._move(
                    job_id, {JobStatus.PAUSING}, JobStatus.PAUSED, paused_at(job.step), estimated_finish=None
                )
        return await asyncio.to_thread(self._store.job, job_id)

    async def resume(self, job_id: str) -> JobRecord:
        """Queue a paused job again; it goes on with the same trajectory.

        Raises:
            APIError: 404, there is no such job; 409, it is not paused; 429, its project has no tokens left today.
        """
        await asyncio.to_thread(self._quotas.check_tokens)
        async with self._lock(job_id):
            job = await asyncio.to_thread(self._store.job, job_id)
            _check_not_cancelling(job)
            moved = await self._move(job_id, {JobStatus.PAUSED}, JobStatus.QUEUED, event("The job is queued again"))
            if moved is None:
                raise APIError(409, f"job {job_id} is {job.status}: only a paused job can be resumed.")
            if job_id in self._other_base:
                return moved
            try:
                await self._client.call("zo_resume", job_id)
            except ConfigError as error:  # it has failed while it was paused: its follower reports the reason
                raise APIError(409, str(error)) from error
        # A second time: `_move` woke the follower, which may have asked the engine before it was resumed.
        self._hub.notify(job_id)
        return moved

    async def cancel(self, job_id: str) -> JobRecord:
        """End a job; its last checkpoint stays usable. Returns when the job has ended, or after `CANCEL_WAIT_S`.

        It first writes the request into the record. If that fails (a full disk), nothing has happened. Once it is
        written, the job ends as cancelled, also after a restart of the server.

        Raises:
            APIError: 404, there is no such job; 409, it has ended already.
        """
        async with self._lock(job_id):
            job = await asyncio.to_thread(self._store.job, job_id)
            if job.status.ended:
                raise APIError(409, f"job {job_id} is {job.status}: it has ended already.")
            await self._stop(job)
        # Without the lock, which the task may need to end. `wait` leaves the task alone at its timeout; `wait_for`
        # would cancel it, and the job's end would not be recorded.
        if (task := self._tasks.get(job_id)) is not None:
            await asyncio.wait([task], timeout=CANCEL_WAIT_S)
        job = await asyncio.to_thread(self._store.job, job_id)
        if job.status.ended and job.status != JobStatus.CANCELLED:  # it took its last step meanwhile
            raise APIError(409, f"job {job_id} is {job.status}: it has ended already.")
        return job

    async def _stop(self, job: JobRecord) -> None:
        if job.id in self._other_base:
            await self._follower(job).end(JobStatus.CANCELLED, "")
        elif job.status == JobStatus.VALIDATING:
            told = event("The job was cancelled")
            changes = {"cancelling": True, "finished_at": now()}
            await self._move(job.id, {JobStatus.VALIDATING}, JobStatus.CANCELLED, told, **changes)
            # A thread that prepares the job cannot be cancelled: it runs to its end, and its result is dropped.
            self._tasks[job.id].cancel()
        else:
            await asyncio.to_thread(self._store.change_job, job.id, cancelling=True)
            await self._client.call("zo_stop", job.id, True)
            self._hub.notify(job.id)

    def _lock(self, job_id: str) -> asyncio.Lock:
        return self._locks.setdefault(job_id, asyncio.Lock())

    async def _move(
        self, job_id: str, before: Collection[JobStatus], status: JobStatus, *events: dict[str, Any], **changes: Any
    ) -> JobRecord | None:
        job = await asyncio.to_thread(self._store.move_job, job_id, before, status, *events, **changes)
        self._hub.notify(job_id)
        return job

    async def alone(self) -> str | None:
        """The `fold` job that has the base to itself: its turn has come, it runs, or its model is being written."""
        # Every request that uses the model comes here; without such a job it must not wait for the engine.
        if not self._exclusive:
            return None
        owner: str | None = (await self._client.call("zo_stats"))["base_owner"]
        if owner is None or owner not in self._exclusive:
            return None
        # The task of a job outlives by a moment the record that it has ended, and a client may have read that.
        with acting_for(None):  # the request may be another project's
            job = await asyncio.to_thread(self._store.job, owner)
        return None if job.status.ended else owner

    # --- the end of the server ----------------------------------------------------------------------------------------

    def leave_all(self) -> None:
        """Note that the server is going down: an error in a job's task is no fault of the job from now on.

        Any thread may call it; it only sets a flag.
        """
        self._stopping = True

    async def stop(self) -> None:
        """End every task. The jobs stay as they are, and go on after the next start of the server.

        If the engine has crashed, running jobs fail: the server ends for that reason, perhaps before their tasks have
        noticed.
        """
        # Asked before `leave_all`: once the flag is set, the server itself has ended the engine.
        crashed = not self._stopping and self._engine_gone() and await self._serving.engine_crashed()
        self.leave_all()
        tasks = dict(self._tasks)  # a copy: each task removes itself at its end
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        for job_id in tasks if crashed else ():
            job = await asyncio.to_thread(self._store.job, job_id)
            if job.status == JobStatus.RUNNING:
                await self._follower(job).end(JobStatus.FAILED, *ENGINE_DIED)

    # --- one task a job -----------------------------------------------------------------------------------------------

    def _spawn(self, job: JobRecord) -> None:
        # In a context of its own: a job outlives the request that has created it, and works for the operator.
        ahead = [entered for owner, entered in self._validating.values() if owner == job.owner]
        if job.status == JobStatus.VALIDATING:
            self._validating[job.id] = job.owner, asyncio.Event()
        task = asyncio.create_task(self._attend(job, ahead), name=job.id, context=Context())
        self._tasks[job.id] = task
        if job.exclusive:
            self._exclusive.add(job.id)

        def forget(_: asyncio.Task[None]) -> None:
            del self._tasks[job.id]
            self._let_next_enter(job)
            self._exclusive.discard(job.id)
            self._on_end(job.id)

        task.add_done_callback(forget)

    def _let_next_enter(self, job: JobRecord) -> None:
        if (waiting := self._validating.pop(job.id, None)) is not None:
            waiting[1].set()

    async def _attend(self, job: JobRecord, ahead: Sequence[asyncio.Event]) -> None:
        """Attend to a job until its end. Any error fails the job, with the reason: no task ends in silence.

        Cancelling the task does not: CancelledError is no Exception.

        Args:
            ahead: events to wait for before the job enters the engine's queue. A project's jobs enter in the order in
                which they were created, however long their files take to validate.
        """
        try:
            if job.status == JobStatus.VALIDATING:
                changes = await self._validate(job)
                for entered in ahead:
                    await entered.wait()
                job = await self._enter(job, changes)
                self._let_next_enter(job)
            await self._follow(job)
            if not job.exclusive:  # the base may hold such a job's weights, and get its own back later
                async with self._lock(job.id):  # not between a client's look at the job and its call to the engine
                    await self._client.call("zo_drop", job.id)
        except Exception as error:  # the boundary of the job: an unknown failure must not end the server
            if not self._stopping:
                await self._on_error(job, error)

    async def _validate(self, job: JobRecord) -> dict[str, Any]:
        told = event(f"Validating training file: {job.training_file}")
        await when_there_is_room(lambda: asyncio.to_thread(self._store.change_job, job.id, told))
        self._hub.notify(job.id)
        return await asyncio.to_thread(self.preparer.prepare, job)

    async def _enter(self, job: JobRecord, changes: dict[str, Any]) -> JobRecord:
        """Put a validated job into the engine's queue. A client that cancels meanwhile waits for the lock, and then
        finds a queued job."""

        async def enter() -> JobRecord:
            told = event("Files validated, moving job to queued state")
            async with self._lock(job.id):
                queued = await self._move(
                    job.id, {JobStatus.VALIDATING}, JobStatus.QUEUED, told, handed_over_at=now(), **changes
                )
                assert queued is not None, "a job that is cancelled before has no task any more"
                await self._start(queued)
            return queued

        return await when_there_is_room(enter)  # around the lock: between two tries a client can cancel the job

    async def _start(self, job: JobRecord) -> None:
        await asyncio.to_thread(self.preparer.check_start, job)  # reads the request again, a grader in it too
        # Only the path: the engine's process reads the job from its directory.
        await self._client.call("zo_start", str(self._outcome.job_dir(job).path), job.status == JobStatus.PAUSED)

    async def _follow(self, job: JobRecord) -> None:
        observer = await asyncio.to_thread(observer_for, job, self._outcome.job_dir(job).path)
        try:
            async with self._rollouts.of_job(self._outcome.job_dir(job), job.owner):
                await self._follower(job, observer).follow()
        finally:
            if observer is not None:
                await asyncio.to_thread(observer.close)

    def _follower(self, job: JobRecord, observer: Any = None) -> Follower:
        return Follower(job, self._outcome, self._hub, observer, self._count_tokens)

    async def _count_tokens(self, job: JobRecord, tokens: int) -> None:
        """Count what a job has trained on; pause it where its project has used up its day."""
        if job.owner == OPERATOR or not tokens:
            return
        await asyncio.to_thread(self._store.add_tokens, job.owner, today(), tokens)
        if (limit := await asyncio.to_thread(self._quotas.spent_by, job.owner)) is not None:
            with contextlib.suppress(APIError):  # it has ended, or a client has paused it
                await self.pause(job.id, f"Pausing: project {job.owner} has used its {limit} training tokens of today")

    async def _on_error(self, job: JobRecord, error: Exception) -> None:
        job = await asyncio.to_thread(self._store.job, job.id)
        why, code = f"{type(error).__name__}: {error}", "server_error"
        if isinstance(error, ZOError | OSError):
            # A JobError wraps the error of the disk.
            full = disk_error(error.__cause__ if isinstance(error.__cause__, OSError) else error)
            code = "invalid_training_file" if job.status == JobStatus.VALIDATING else "job_refused"
            why = str(full or error)
        elif not self._engine_gone():
            logger.exception("job %s", job.id, exc_info=error)
        elif await self._serving.engine_crashed():
            why, code = ENGINE_DIED
        else:
            return  # the engine ends with the server: the job goes on after the next start
        await self._follower(job).end(JobStatus.FAILED, why, code)

    def _engine_gone(self) -> bool:
        return bool(self.preparer.engine.errored)


def _check_not_cancelling(job: JobRecord) -> None:
    if job.cancelling:
        raise APIError(409, f"job {job.id} is being cancelled.")
