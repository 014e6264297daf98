"""Rows that clients append to continual jobs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from io import BytesIO
from typing import Any

from vllm_zo.data.load import Examples, read_jsonl
from vllm_zo.entrypoints.llm.append import Appender
from vllm_zo.entrypoints.server.http.errors import DISK_FULL, APIError
from vllm_zo.entrypoints.server.jobs.prepare import Preparer
from vllm_zo.entrypoints.server.state.files import check_jsonl
from vllm_zo.entrypoints.server.state.store import Store
from vllm_zo.errors import ConfigError, JobError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.status import JobStatus
from vllm_zo.objectives import Objective

NAME = "examples"
"""Of the rows, in messages."""


class GrowingJobs:
    """Keeps one `Appender` for each job that clients append to.

    Args:
        client: calls the engine's `zo_*` methods.
    """

    def __init__(self, preparer: Preparer, store: Store, client: Any) -> None:
        self._preparer, self._store, self._client = preparer, store, client
        self._appenders: dict[str, Appender] = {}
        self._lock = threading.Lock()

    async def append_body(self, job_id: str, body: bytes, key: str | None) -> dict[str, Any]:
        """Append the rows of a request: a JSONL body, or `{"file": id}`.

        Args:
            key: the request's Idempotency-Key; the SDK gives the tries of one call the same.

        Raises:
            APIError, ConfigError: the job cannot grow, or a row cannot be used; nothing is appended then.
            OSError, JobError: the disk refuses; nothing is appended.
        """
        rows = await asyncio.to_thread(self._read, body)
        named = None if key is None else "request-" + hashlib.sha256(key.encode()).hexdigest()[:32]
        appended, total = await self.append(job_id, rows, named)
        return {"object": "fine_tuning.job.examples", "id": job_id, "appended": appended, "total": total}

    async def append(
        self, job_id: str, rows: Any, key: str | None, objective: Objective | None = None
    ) -> tuple[int, int]:
        """Append rows, and let the engine draw from them; returns how many, and how many there are now.

        Args:
            rows, key, objective: see `Appender.append`.

        Raises: as `append_body`.
        """
        await self.check(job_id)
        appender = await asyncio.to_thread(self.appender, job_id)
        try:
            await self._client.call("zo_extend", job_id, appender.size)
        except ConfigError as error:  # it has ended since, or waits for a server with its model
            raise APIError(409, str(error)) from error
        try:
            count = await asyncio.to_thread(appender.append, rows, NAME, key, objective)
        except JobError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in DISK_FULL:
                raise cause from error  # it reaches `disk_error`, which answers 507
            raise
        await self._extend(job_id, appender)
        return count, appender.count

    async def _extend(self, job_id: str, appender: Appender) -> None:
        try:
            await self._client.call("zo_extend", job_id, appender.size)
        except ConfigError as error:
            # The rows are on disk: a run that goes on from this job draws from them.
            raise APIError(409, str(error)) from error

    async def delete(self, job_id: str, key: str) -> None:
        """Remove the rows of a call from the file, and from what the job draws. Raises JobError: the disk refuses."""
        appender = await asyncio.to_thread(self.appender, job_id)
        await asyncio.to_thread(appender.delete, key)
        job = await asyncio.to_thread(self._store.job, job_id)
        if not job.status.ended:
            await self._client.call("zo_forget", job_id, key)

    async def check(self, job_id: str) -> None:
        """Refuse a job that takes no rows now.

        Raises:
            APIError: 404, there is no such job; 409, it is being validated, or has ended.
        """
        job = await asyncio.to_thread(self._store.job, job_id)
        if job.status == JobStatus.VALIDATING:
            raise APIError(409, f"job {job_id} is {job.status}: append rows once it is queued.")
        if job.status.ended or job.cancelling:
            raise APIError(409, f"job {job_id} is {job.status}: it learns no more.")

    def appender(self, job_id: str) -> Appender:
        """The one writer of the job's rows. It blocks. Raises what `Appender` raises."""
        with self._lock:
            if job_id not in self._appenders:
                directory = JobDir(self._preparer.state.job(job_id))
                self._appenders[job_id] = Appender(self._preparer.engine, directory, self._preparer.render)
            return self._appenders[job_id]

    def forget(self, job_id: str) -> None:
        """Free what is kept for a job that has ended."""
        with self._lock:
            self._appenders.pop(job_id, None)

    def _read(self, body: bytes) -> Examples:
        if (file_id := _file_named(body)) is not None:
            return Examples(self._preparer.files.records(file_id, "file"), NAME)
        check_jsonl(BytesIO(body), NAME)
        return Examples(list(read_jsonl(BytesIO(body), NAME)), NAME)


def _file_named(body: bytes) -> str | None:
    """The file that a body names; None if it holds rows itself."""
    try:
        given = json.loads(body)
    except ValueError:
        return None
    if isinstance(given, dict) and list(given) == ["file"]:
        if not isinstance(given["file"], str):
            raise APIError(400, f"file={given['file']!r:.80}: expected the id of a file.", "file")
        return given["file"]
    return None
