"""Which job runs when: a queue that outlives the server, and the calls of a client on its jobs."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from vllm_zo.config import JobConfig
from vllm_zo.entrypoints.openai.errors import APIError, disk_error
from vllm_zo.entrypoints.openai.events import EventHub
from vllm_zo.entrypoints.openai.exports import log_position
from vllm_zo.entrypoints.openai.follow import Follower
from vllm_zo.entrypoints.openai.job_request import Wanted
from vllm_zo.entrypoints.openai.models import ModelNames
from vllm_zo.entrypoints.openai.prepare import Preparer
from vllm_zo.entrypoints.openai.serving import Serving
from vllm_zo.entrypoints.openai.store import Store
from vllm_zo.entrypoints.openai.turns import Turns
from vllm_zo.entrypoints.openai.wandb_run import observer_for
from vllm_zo.entrypoints.openai.wire import (
    CANCELLED,
    FAILED,
    FINAL,
    PAUSED,
    PAUSING,
    QUEUED,
    RUNNING,
    UNFINISHED,
    VALIDATING,
    event,
    now,
)
from vllm_zo.errors import ConfigError, ZOError

logger = logging.getLogger("vllm.zo.server")

ENGINE_DIED = ("The engine process died", "engine_died")
"""Message and code of a job's error."""
SETTLE_INTERVAL_S = 0.02
CANCEL_WAIT_S = 20.0
"""How long `cancel` waits for the groups in flight before it answers."""


class JobRunner:
    """Every unfinished job that is not paused has one task here. For one event loop.

    Args:
        client: calls the engine's `zo_*` methods.
        concurrent_jobs: jobs that are in the engine at the same time; the others wait here.
    """

    def __init__(
        self,
        client: Any,
        preparer: Preparer,
        store: Store,
        names: ModelNames,
        hub: EventHub,
        serving: Serving,
        concurrent_jobs: int,
    ) -> None:
        self._client, self._preparer, self._store = client, preparer, store
        self._names, self._hub, self._serving = names, hub, serving
        self.turns = Turns(concurrent_jobs)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._in_engine: set[str] = set()
        """Jobs that the engine knows and that have not ended there: running, or paused."""
        self._stopping = False

    def check(self, wanted: Wanted) -> JobConfig:
        """`Preparer.check`."""
        return self._preparer.check(wanted)

    @property
    def model_path(self) -> str:
        """The base model as the engine names it: where exports find its configuration."""
        return str(self._preparer.engine.model_config.model)

    # --- what clients ask for -----------------------------------------------------------------------------------------

    def submit(self, job: dict[str, Any]) -> None:
        """Take on a new job whose record is written."""
        self._spawn(job)

    async def resume_all(self) -> None:
        """After a start of the server: go on with everything that is unfinished."""
        for job in await asyncio.to_thread(self._store.all, "jobs", statuses=UNFINISHED):
            if job["status"] == PAUSING:
                job = await self._set(job["id"], status=PAUSED)
            if job["status"] == PAUSED:
                continue
            if job["status"] == RUNNING:
                steps = await asyncio.to_thread(log_position, self._preparer.state.job(job["id"]))
                job = await self._set(
                    job["id"], f"The server was restarted; the job goes on from step {steps}", status=QUEUED
                )
            self._spawn(job)

    async def pause(self, job: dict[str, Any]) -> dict[str, Any]:
        """Stop at the next group boundary; a queued job at once.

        Raises:
            APIError: 409, it is in no state for that.
        """
        job = await self._settled(job)
        job_id, status = job["id"], job["status"]
        if status == QUEUED:
            await self._drop_task(job_id)
            return await self._set(job_id, "The job is paused before its first step", status=PAUSED)
        if status != RUNNING:
            raise APIError(409, f"job {job_id} is {status}: only a queued or running job can be paused.")
        if job["exclusive"]:
            raise APIError(409, f"job {job_id} (update_space='fold') has changed the base: let it end, or cancel it.")
        # Its follower writes "paused" as soon as it hears of it: "pausing" must be there before.
        job = await self._set(job_id, "Pausing after the group that is running", status=PAUSING)
        try:
            await self._client.call("zo_pause", job_id)
        except ConfigError as error:
            await self._set(job_id, status=RUNNING)
            raise APIError(409, str(error)) from error
        return job

    async def resume(self, job: dict[str, Any]) -> dict[str, Any]:
        """Queue a paused job again; it goes on with the same trajectory.

        Raises:
            APIError: 409, it is not paused.
        """
        if job["status"] != PAUSED:
            raise APIError(409, f"job {job['id']} is {job['status']}: only a paused job can be resumed.")
        job = await self._set(job["id"], "The job is queued again", status=QUEUED)
        self._spawn(job)
        return job

    async def cancel(self, job: dict[str, Any]) -> dict[str, Any]:
        """End a job; its last checkpoint stays usable. Answers when it has ended, within `CANCEL_WAIT_S`.

        Raises:
            APIError: 409, it has ended already.
        """
        job = await self._settled(job)
        job_id = job["id"]
        if job["status"] in FINAL:
            raise APIError(409, f"job {job_id} is {job['status']}: it has ended already.")
        if job_id in self._in_engine:
            await self._client.call("zo_stop", job_id, True)
            if job_id not in self._tasks:  # it was paused
                self._spawn(job, ending=True)
            await asyncio.wait([self._tasks[job_id]], timeout=CANCEL_WAIT_S)
        else:
            await self._drop_task(job_id)
            await self._set(job_id, "The job was cancelled", status=CANCELLED, finished_at=now())
        return await asyncio.to_thread(self._read, job_id)

    async def _settled(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job's record, once it is not on its way from the queue into the engine: half-way nothing can be done."""
        while job["status"] == QUEUED and self.turns.has_turn(job["id"]):
            await asyncio.sleep(SETTLE_INTERVAL_S)
            job = await asyncio.to_thread(self._read, job["id"])
        return job

    def _read(self, job_id: str) -> dict[str, Any]:
        job = self._store.find("jobs", job_id)
        assert job is not None, "jobs are never deleted"
        return job

    def leave_all(self) -> None:
        """The server is going down: whatever a job's task meets from now on is no fault of the job. From any thread."""
        self._stopping = True

    async def stop(self) -> None:
        """End every task; the jobs stay as they are, to go on after the next start. Not so if the engine has crashed:
        the server ends for that reason, perhaps before a job's task has heard of it."""
        crashed = not self._stopping and self._engine_gone() and await self._serving.engine_crashed()
        self.leave_all()
        tasks = dict(self._tasks)
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        for job_id in tasks if crashed else ():
            job = await asyncio.to_thread(self._store.find, "jobs", job_id)
            if job is not None and job["status"] == RUNNING:
                await self._fail(job_id, *ENGINE_DIED)

    @property
    def idle(self) -> bool:
        """Whether no job runs, waits for its turn, or is paused in the engine."""
        return self.turns.idle and not self._in_engine

    # --- one task a job -----------------------------------------------------------------------------------------------

    def _spawn(self, job: dict[str, Any], *, ending: bool = False) -> None:
        job_id = job["id"]
        task = asyncio.create_task(self._guarded(job, ending), name=job_id)
        self._tasks[job_id] = task

        def forget(done: asyncio.Task[None]) -> None:
            if self._tasks.get(job_id) is done:
                del self._tasks[job_id]

        task.add_done_callback(forget)

    async def _drop_task(self, job_id: str) -> None:
        if (task := self._tasks.get(job_id)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _guarded(self, job: dict[str, Any], ending: bool) -> None:
        """Whatever goes wrong with a job is the job's failure, with the reason; never a task that dies in silence."""
        job_id = job["id"]
        try:
            if ending:
                await self._follow(job)
                return
            if job["status"] == VALIDATING:
                job = await self._prepare(job)
            async with self.turns.turn(job_id, alone=job["exclusive"]):
                await self._follow(await self._start(job))
        except Exception as error:  # the boundary of the job: an unknown failure must not end the server
            if not self._stopping:
                await self._on_error(job, error)

    async def _prepare(self, job: dict[str, Any]) -> dict[str, Any]:
        await self._set(job["id"], f"Validating training file: {job['training_file']}")
        changes = await asyncio.to_thread(self._preparer.prepare, job)
        return await self._set(job["id"], "Files validated, moving job to queued state", status=QUEUED, **changes)

    async def _start(self, job: dict[str, Any]) -> dict[str, Any]:
        """Bring a job into the engine, or a paused one back to work."""
        job_id = job["id"]
        if job_id in self._in_engine:
            await self._client.call("zo_resume", job_id)
            return await self._set(job_id, "The job goes on", status=RUNNING)
        job = await asyncio.to_thread(self._follower(job).catch_up)
        await self._client.call("zo_start", str(self._preparer.state.job(job_id)))
        self._in_engine.add(job_id)
        return await self._set(job_id, "Fine-tuning job started", status=RUNNING)

    async def _follow(self, job: dict[str, Any]) -> None:
        observer = await asyncio.to_thread(observer_for, job, self._preparer.state.job(job["id"]))
        try:
            status = await self._follower(job, observer).follow()
        finally:
            if observer is not None:
                await asyncio.to_thread(observer.close)
        if status in FINAL:
            self._in_engine.discard(job["id"])

    def _follower(self, job: dict[str, Any], observer: Any = None) -> Follower:
        state, files = self._preparer.state, self._preparer.files
        return Follower(job, self._client, state, self._store, files, self._names, self._hub, observer)

    async def _on_error(self, job: dict[str, Any], error: Exception) -> None:
        job_id = job["id"]
        if isinstance(error, ZOError | OSError):
            full = disk_error(error.__cause__ if isinstance(error.__cause__, OSError) else error)
            code = "invalid_training_file" if job["status"] == VALIDATING else "job_refused"
            await self._fail(job_id, str(full or error), code)
        elif not self._engine_gone():
            logger.exception("job %s", job_id, exc_info=error)
            await self._fail(job_id, f"{type(error).__name__}: {error}", "server_error")
        elif await self._serving.engine_crashed():
            await self._fail(job_id, *ENGINE_DIED)

    def _engine_gone(self) -> bool:
        return bool(self._preparer.engine.errored)

    async def _fail(self, job_id: str, why: str, code: str) -> None:
        job = await asyncio.to_thread(self._store.find, "jobs", job_id)
        if job is None or job["status"] in FINAL:
            return
        self._in_engine.discard(job_id)
        await self._follower(job).end(FAILED, why, code)

    async def _set(self, job_id: str, message: str | None = None, **changes: Any) -> dict[str, Any]:
        """A change of a job's record and the event that tells of it, together or not at all."""

        def write() -> dict[str, Any]:
            with self._store.transaction():
                if message is not None:
                    self._store.add("events", event(message), parent=job_id)
                return self._store.update("jobs", job_id, **changes)

        job = await asyncio.to_thread(write)
        self._hub.notify(job_id)
        return job
