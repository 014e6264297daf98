"""Follows one job in the engine to its end: makes events and fields of its record from the engine's answers."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from vllm_zo.entrypoints.server.http.errors import when_there_is_room
from vllm_zo.entrypoints.server.http.events import EventHub
from vllm_zo.entrypoints.server.http.schemas import event, now
from vllm_zo.entrypoints.server.jobs.outcome import Outcome, log_position
from vllm_zo.entrypoints.server.jobs.progress import Progress
from vllm_zo.entrypoints.server.jobs.request import with_learning_rate
from vllm_zo.entrypoints.server.metrics import kv_cache_usage
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.jobs.records import Metrics
from vllm_zo.jobs.status import UNFINISHED, JobStatus
from vllm_zo.methods.step_size import AUTO

logger = logging.getLogger("vllm.zo.server")

Result = TypeVar("Result")
CountTokens = Callable[[JobRecord, int], Awaitable[None]]

POLL_INTERVAL_S = 0.2
"""Seconds between two questions about a job that runs."""
WAITING_POLL_INTERVAL_S = 1.0
"""Seconds between two questions about a job that waits for a lane or is paused. There may be many such jobs, and each
question is a call to the engine."""
MAX_EVENTS, TRIM_EVERY = 10_000, 1_000
"""A continual job makes an event a step without end: its newest are kept, and looked after every so often."""
LAST_VERSION_LOOKS = 50
"""How often to look for the last versions of an ended job, POLL_INTERVAL_S apart."""


class Follower:
    """Asks the engine about one job until the job has ended, and writes the answers down.

    Everything here may happen twice: a server that was killed in the middle does it again after its restart. And every
    answer may be a moment old: a client may have paused or cancelled the job since. So this class never sets a status;
    it moves it from one of the statuses before (`Store.move_job`).

    Args:
        observer: a function that takes every metrics record, called in a thread (wandb).
        count: takes the tokens that the job has trained on since the last call.
    """

    def __init__(
        self, job: JobRecord, outcome: Outcome, hub: EventHub, observer: Any = None, count: CountTokens | None = None
    ) -> None:
        self.job = job
        self.progress = Progress(job)
        self._outcome, self._store, self._client, self._hub = outcome, outcome.store, outcome.client, hub
        self._directory = outcome.job_dir(job)
        self._seen = self._told = 0
        self._waits_for: str | None = None
        self._paused_because: str | None = None
        self._refused: set[int] = set()
        """Steps whose checkpoint the engine has refused. Each gets one event, and is not tried again."""
        self.observer = observer
        self._count = count

    async def follow(self) -> None:
        """Follow the job until it has ended. Its record then says how.

        Raises:
            EngineDeadError: the engine process has died.
        """
        with self._hub.listening(self.job.id) as changed:
            while True:
                answer = await self._client.call("zo_status", self.job.id, self._seen)
                status = JobStatus(answer["status"])
                self._seen = answer["next"]
                await self._tell_why_it_waits(answer["waits_for"])
                self._paused_because = answer.get("paused_because")
                # In this order: a checkpoint takes its numbers from the records before it, and wandb may be slow.
                await self._record(status, answer["records"], answer["learning_rate"])
                await self._observe(answer["records"])
                await self._publish()
                if status.ended:
                    await self._last_versions(answer["published"])
                    await self._finish(status, answer["error"])
                    return
                await _wait(changed, status)

    async def _tell_why_it_waits(self, why: str | None) -> None:
        """Write an event when the job begins to wait for a full disk, and when it goes on."""
        if (why is None) == (self._waits_for is None):
            return
        self._waits_for = why
        said = event("The job goes on: the disk has room") if why is None else event(f"The job waits: {why}", "warn")
        # The store may be on the same disk: until it has room, clients see the event without it.
        await self._write(lambda: self._store.change_job(self.job.id, said), shown=said)

    async def _record(self, status: JobStatus, records: list[Metrics], learning_rate: float | None) -> None:
        before = copy.deepcopy(self.progress)

        def write() -> bool:
            # A write that failed is tried again from here: its records must count as new once more.
            self.progress = copy.deepcopy(before)
            # One transaction: no client sees a step of a job that is still queued.
            with self._store.transaction():
                moved = self._move_on(status, ran=bool(records))
                told = self._tell(records, learning_rate)
            return moved or told

        if await self._when_there_is_room(write):
            self._hub.notify(self.job.id)
        if self._count is not None:
            await self._count(self.job, self.progress.trained_tokens - before.trained_tokens)

    def _move_on(self, status: JobStatus, *, ran: bool) -> bool:
        """Move the job's status to the engine's, if the job waits for that. Returns whether it did.

        Args:
            ran: there are new records, so the job runs, or has run since the last answer: a short one may have ended
                or paused itself meanwhile.
        """
        step, job = self.progress.step, None
        if status == JobStatus.RUNNING or ran:
            said = "The job goes on" if step else "Fine-tuning job started"
            job = self._store.move_job(self.job.id, {JobStatus.QUEUED}, JobStatus.RUNNING, event(said))
        if status == JobStatus.PAUSED:
            told, before = paused_at(step), {JobStatus.PAUSING}
            if self._paused_because is not None:  # the job has paused itself
                told, before = (
                    event(f"The job is paused at step {step}: {self._paused_because}", "warn"),
                    {*before, JobStatus.RUNNING},
                )
            job = self._store.move_job(self.job.id, before, status, told, estimated_finish=None) or job
        self.job = job or self.job
        return job is not None

    def _tell(self, records: list[Metrics], learning_rate: float | None) -> bool:
        """Write events and numbers of the new records. Returns whether there was anything to write."""
        changes: dict[str, Any] = {}
        if learning_rate is not None and self.job.hyperparameters["learning_rate"] == AUTO:
            changes = with_learning_rate(self.job.to_json(), learning_rate)
        if not records and not changes:
            return False
        events = self.progress.take(records, kv_cache_usage())
        changes |= self.progress.fields()
        self.job = self._store.change_job(self.job.id, *events, **changes)
        self._told += len(events)
        if self.job.continual and self._told >= TRIM_EVERY:
            self._told = 0
            self._store.trim("events", self.job.id, MAX_EVENTS)
        return True

    def catch_up(self) -> JobRecord:
        """Write the steps that the engine of a killed server has logged and the record lacks; returns the record.

        The new engine goes on behind the seed log, and never reports the steps in it. Steps that only the metrics have
        are taken again, and reported then.
        """
        steps = log_position(self._directory)
        self._tell([record for record in self._directory.read_metrics() if record["step"] <= steps], None)
        return self.job

    async def _observe(self, records: list[Metrics]) -> None:
        if self.observer is None or not records:
            return
        try:
            await asyncio.to_thread(lambda: [self.observer(record) for record in records])
        except Exception as error:  # wandb is another party's service: its errors must not fail the job
            self.observer = None
            await self._say(event(f"wandb gets no more metrics: {type(error).__name__}: {error}", "warn"))

    async def _publish(self, *, ended: bool = False) -> None:
        if events := await self._outcome.publish(self.job, self.progress, self._refused, ended=ended):
            await self._say(*events)

    async def _last_versions(self, published: list[int]) -> None:
        """Wait for the last states and publish them: the engine writes them after it has reported the job's end."""
        for _ in range(LAST_VERSION_LOOKS):
            if set(published) <= set(self._directory.published()):
                break
            await asyncio.sleep(POLL_INTERVAL_S)
        await self._publish(ended=True)

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _finish(self, status: JobStatus, error: str | None) -> None:
        if status == JobStatus.SUCCEEDED:
            await self._succeed()
            return
        # Before the end is written: when a client sees it, the base is as it was loaded.
        if self.job.exclusive:
            await self._outcome.restore_base(self.job)
        await self.end(status, error or "")

    async def _succeed(self) -> None:
        name, events = await self._outcome.model(self.job, self.progress)
        files = self.job.result_files or [await asyncio.to_thread(self._outcome.result_file, self.job)]
        done = event("The job has successfully completed")
        await self._move_to(JobStatus.SUCCEEDED, *events, done, fine_tuned_model=name, result_files=files)

    async def end(self, status: JobStatus, why: str, code: str = "training_failed") -> None:
        """Close a job that did not succeed. Its checkpoints stay usable.

        A job that a client has cancelled ends as cancelled, even if it failed since: the client has got that answer.
        """
        last = await asyncio.to_thread(self._outcome.last_checkpoint, self.job)
        kept = f"Its last checkpoint is {last}." if last else "It has no checkpoint yet."
        # From the store: `self.job` may be older than the client's request.
        if status == JobStatus.CANCELLED or (await asyncio.to_thread(self._store.job, self.job.id)).cancelling:
            await self._move_to(
                JobStatus.CANCELLED, event(f"The job was cancelled at step {self.progress.step}. {kept}")
            )
            return
        message = f"{why.rstrip('.')}. {kept}"
        told = event(f"The job failed at step {self.progress.step}: {message}", "error")
        await self._move_to(status, told, error={"code": code, "message": message, "param": None})

    async def _move_to(self, status: JobStatus, *events: dict[str, Any], **changes: Any) -> None:
        changes |= {"finished_at": now(), "estimated_finish": None}
        await self._write(lambda: self._store.move_job(self.job.id, UNFINISHED, status, *events, **changes))

    async def _say(self, *events: dict[str, Any]) -> None:
        await self._write(lambda: self._store.change_job(self.job.id, *events))

    async def _write(self, write: Callable[[], JobRecord | None], shown: dict[str, Any] | None = None) -> None:
        job = await self._when_there_is_room(write, shown)
        self.job = job or self.job
        self._hub.notify(self.job.id)

    async def _when_there_is_room(self, write: Callable[[], Result], shown: dict[str, Any] | None = None) -> Result:
        """Call `write` in a thread until the store has room. Meanwhile clients see an event that says why nothing
        happens; the store gets it afterwards, and one that the job goes on.

        Args:
            shown: the event that `write` itself writes, if it says that.
        """
        waits = shown or event("The job waits: the server's disk is full", "warn")

        def show() -> None:
            if self._hub.unwritten.setdefault(self.job.id, waits) is waits:
                self._hub.notify(self.job.id)

        try:
            result = await when_there_is_room(lambda: asyncio.to_thread(write), show)
            if waits is self._hub.unwritten.get(self.job.id) and shown is None:
                both = waits, event("The job goes on: the server's disk has room")
                await when_there_is_room(lambda: asyncio.to_thread(self._store.change_job, self.job.id, *both))
            return result
        finally:
            self._hub.unwritten.pop(self.job.id, None)


def paused_at(step: int) -> dict[str, Any]:
    """The event of a pause. The client's call or the follower writes it, the one that learns of the pause first."""
    return event(f"The job is paused at step {step}" if step else "The job is paused before its first step")


async def _wait(changed: asyncio.Event, status: JobStatus) -> None:
    """Wait until it is worth asking again: for the status's interval, or until a client does something to the job."""
    at_work = status in (JobStatus.RUNNING, JobStatus.PAUSING)
    # Most notices until now are the follower's own. If one of a client is among them, the interval catches it.
    changed.clear()
    try:
        await asyncio.wait_for(changed.wait(), POLL_INTERVAL_S if at_work else WAITING_POLL_INTERVAL_S)
    except TimeoutError:
        return
