"""`await engine.finetune(...)`: the methods that `AsyncLLM` gains. None of them blocks the event loop that serves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from vllm_zo.config import JobConfig
from vllm_zo.entrypoints.llm.append import Appender
from vllm_zo.entrypoints.llm.callbacks.progress_bar import with_progress
from vllm_zo.entrypoints.llm.chats import chats_of
from vllm_zo.entrypoints.llm.client import LIVENESS_INTERVAL_S, POLL_INTERVAL_S, AsyncEngineClient
from vllm_zo.entrypoints.llm.handle import Callback, JobResult
from vllm_zo.entrypoints.llm.prepare import (
    PreparedJob,
    check_base_as_loaded,
    check_played,
    job_config,
    prepare_evaluation,
    prepare_job,
)
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.status import FINAL
from vllm_zo.objectives import Objective, Rollout, Trust


class AsyncFineTuneRun(JobResult):
    """`FineTuneRun` for an `AsyncLLM`: its `poll`, `wait`, `cancel` and `stop` are coroutines."""

    _client: AsyncEngineClient

    async def add(self, rows: Any) -> int:
        """Append rows to a continual job: `FineTuneRun.add`."""
        appender = self._growing()
        await self._client.call("zo_extend", self.job_id, appender.size)
        count = await asyncio.to_thread(appender.append, rows)
        await self._client.call("zo_extend", self.job_id, appender.size)
        return count

    async def poll(self) -> None:
        """Fetch the new records from the engine and hand them to the callbacks."""
        self._receive(await self._client.call("zo_status", self.job_id, self._seen))

    async def wait(self) -> AsyncFineTuneRun:
        """Return when the job has ended.

        Raises:
            JobError: it failed; the message says why and where its last good state is.
        """
        try:
            await self._follow()
        finally:
            self._close_callbacks()
        self._check_succeeded()
        return self

    async def cancel(self) -> None:
        """Stop the job at once and wait for its end. The logged steps stay usable (`resume_from`, `save`)."""
        await self._client.call("zo_stop", self.job_id, True)
        await self._follow()  # groups in flight are recorded first

    async def stop(self) -> None:
        """Ask the job to stop at its next step boundary; it evaluates and publishes there, as at a normal end."""
        await self._client.call("zo_stop", self.job_id, False)

    async def _follow(self) -> None:
        await self.poll()
        while self.status not in FINAL:
            await asyncio.sleep(POLL_INTERVAL_S)
            await self.poll()


class AsyncTrainingMixin:
    """The training calls of an `AsyncLLM`. They take the arguments and raise the errors of `TrainingMixin`."""

    async def finetune(
        self,
        train: Any,
        validation: Any = None,
        *,
        objective: Objective | None = None,
        config: JobConfig | None = None,
        resume_from: str | Path | None = None,
        chat: Mapping[str, Any] | None = None,
        wait: bool = True,
        callbacks: Iterable[Callback] = (),
        progress: bool = True,
        **options: Any,
    ) -> AsyncFineTuneRun:
        """Fine-tune the model inside the engine. Cancelling the task that waits here cancels the job."""
        config = job_config(config, objective, options)
        check_played(config.objective, chat, wait=wait)
        # In a thread: reading and tokenising the data takes seconds, and would stop every request that is served.
        render = chats_of(self, chat)
        job = await asyncio.to_thread(
            prepare_job, self, train, validation, resume_from, config, render=render, trust=Trust.IMPORTS
        )
        check_base_as_loaded(await AsyncEngineClient(self).call("zo_stats"))
        async with _playing(self, job):
            callbacks = with_progress(callbacks, job.config) if progress else callbacks
            appender = Appender(self, JobDir(job.directory), render) if job.config.continual else None
            run = await _start(self, job, callbacks, appender)
            job.log_start()
            if not wait:
                return run
            try:
                return await run.wait()
            except asyncio.CancelledError:
                # asyncio.run at its end also cancels vLLM's task that reads the engine's answers: without a limit this
                # would wait for ever.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(run.cancel(), LIVENESS_INTERVAL_S)
                raise

    async def evaluate(
        self,
        data: Any,
        objective: Objective | None = None,
        *,
        run: JobResult | None = None,
        chat: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Score `data` inside the engine; returns its loss, its accuracy and what else the objective measures."""
        render = chats_of(self, chat)
        job = await asyncio.to_thread(
            prepare_evaluation, self, data, objective, run, render=render, trust=Trust.IMPORTS
        )
        async with _playing(self, job):
            result = (await (await _start(self, job)).wait()).last_evaluation()
        await asyncio.to_thread(job.discard)
        return result

    async def restore_base(self, run: JobResult) -> None:
        """Give the base weights the values that they had before a `fold` run."""
        await AsyncEngineClient(self).call("zo_restore_base", run.job_id)


@asynccontextmanager
async def _playing(engine: Any, job: PreparedJob) -> AsyncIterator[None]:
    """In the block, the job's rollouts are played, if it has any: server and programs share the engine's event loop."""
    objective = job.config.objective
    if not isinstance(objective, Rollout):
        yield
        return
    # Only here: it imports vLLM's server.
    from vllm_zo.entrypoints.llm.rollouts.exchange import playing
    from vllm_zo.entrypoints.llm.rollouts.opened import OpenedRollouts
    from vllm_zo.entrypoints.llm.rollouts.server import LocalServer

    opened = OpenedRollouts()
    server = LocalServer(engine, opened, objective.server)
    client, directory = AsyncEngineClient(engine), JobDir(job.directory)
    try:
        await server.start()
        async with playing(client, directory, objective, opened, server.url, server.serve_probes):
            yield
    finally:
        await server.stop()


async def _start(
    engine: Any, job: PreparedJob, callbacks: Iterable[Callback] = (), appender: Appender | None = None
) -> AsyncFineTuneRun:
    client = AsyncEngineClient(engine)
    await client.call("zo_start", str(job.directory))
    return AsyncFineTuneRun(client, job.directory, job.config, job.model, callbacks, appender)
