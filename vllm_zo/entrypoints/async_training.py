"""`await engine.finetune(...)`: methods that `AsyncLLM` gains. Nothing in them blocks the event loop that serves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_zo.config import JobConfig
from vllm_zo.engine.job import FINAL_STATES
from vllm_zo.entrypoints.engine_client import LIVENESS_INTERVAL_S, POLL_INTERVAL_S, AsyncEngineClient
from vllm_zo.entrypoints.run import Callback, JobResult
from vllm_zo.entrypoints.training import PreparedJob, prepare_evaluation, prepare_job, with_progress
from vllm_zo.objectives.base import Objective


class AsyncFineTuneRun(JobResult):
    """`FineTuneRun` for an `AsyncLLM`: following and ending it are awaited."""

    def __init__(
        self,
        client: AsyncEngineClient,
        directory: Path,
        config: JobConfig,
        model: str,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        super().__init__(directory, config, model, callbacks)
        self._client = client

    async def poll(self) -> None:
        """Fetch what is new from the engine and hand it to the callbacks."""
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
        """Stop at once; what is logged stays usable (`resume_from`, `save`)."""
        await self._client.call("zo_stop", self.job_id, True)
        await self._follow()  # groups in flight are recorded first

    async def stop(self) -> None:
        """Stop at the next step boundary, evaluate and publish as at a normal end."""
        await self._client.call("zo_stop", self.job_id, False)

    async def _follow(self) -> None:
        await self.poll()
        while self.status not in FINAL_STATES:
            await asyncio.sleep(POLL_INTERVAL_S)
            await self.poll()


class AsyncTrainingMixin:
    """What `AsyncLLM` can do with `zo_training` on. Arguments and errors are those of `TrainingMixin`."""

    async def finetune(
        self,
        train: Any,
        validation: Any = None,
        *,
        objective: Objective,
        resume_from: str | Path | None = None,
        wait: bool = True,
        callbacks: Iterable[Callback] = (),
        progress: bool = True,
        **options: Any,
    ) -> AsyncFineTuneRun:
        """Fine-tune the model inside the engine. Cancelling the task that waits here cancels the job."""
        options = {"objective": objective, **options}
        job = await asyncio.to_thread(prepare_job, self, train, validation, resume_from, options, allow_python=True)
        run = await _start(self, job, with_progress(callbacks, job.config) if progress else callbacks)
        job.log_start()
        if not wait:
            return run
        try:
            return await run.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError):  # at the end of asyncio.run nobody reads the engine's answers
                await asyncio.wait_for(run.cancel(), LIVENESS_INTERVAL_S)
            raise

    async def evaluate(
        self, data: Any, objective: Objective | None = None, *, run: JobResult | None = None
    ) -> dict[str, float]:
        """Loss and accuracy on `data`, scored inside the engine."""
        job = await asyncio.to_thread(prepare_evaluation, self, data, objective, run, allow_python=True)
        return (await (await _start(self, job)).wait()).last_evaluation()

    async def restore_base(self, run: JobResult) -> None:
        """Bring the base weights back to what they were before a `fold` run."""
        await AsyncEngineClient(self).call("zo_restore_base", run.job_id)


async def _start(engine: Any, job: PreparedJob, callbacks: Iterable[Callback] = ()) -> AsyncFineTuneRun:
    client = AsyncEngineClient(engine)
    await client.call("zo_start", str(job.directory))
    return AsyncFineTuneRun(client, job.directory, job.config, job.model, callbacks)
