"""Carries rollouts from the engine to a pool and their answers back, where both belong to one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from vllm_zo.entrypoints.llm.client import POLL_INTERVAL_S
from vllm_zo.entrypoints.llm.rollouts.opened import OpenedRollouts
from vllm_zo.entrypoints.llm.rollouts.pool import RolloutPool
from vllm_zo.entrypoints.llm.rollouts.programs import program_of
from vllm_zo.entrypoints.llm.rollouts.transcripts import Transcripts
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives import Rollout

logger = logging.getLogger("vllm.zo")

SOON_S, SOONS = 0.01, 100
"""After answers the next rollouts are near: so many questions come so quickly, later ones every POLL_INTERVAL_S."""

ServeProbes = Callable[[Iterable[tuple[str, str]]], None]
"""Lets exactly these probes of the job answer: (model, `lora_path`) of each."""


@asynccontextmanager
async def playing(
    client: Any, directory: JobDir, objective: Rollout, opened: OpenedRollouts, server: str, serve_probes: ServeProbes
) -> AsyncIterator[None]:
    """In the block, play the rollouts of a job that the engine has started or will start.

    Args:
        client: an `AsyncEngineClient`.
        server: address of the server that the program asks, without a path.

    Raises:
        ConfigError: the program cannot be imported in this process.
        OSError: the job's rows cannot be read.
    """
    program, changed = program_of(objective, server), asyncio.Event()
    train = await asyncio.to_thread(directory.read_train)
    validation = await asyncio.to_thread(directory.read_validation)
    transcripts = Transcripts(directory)
    pool = RolloutPool(objective, program.play, opened, train, validation, transcripts, changed.set)
    task = asyncio.create_task(_exchange(client, directory.job_id, pool, serve_probes, changed))
    task.add_done_callback(_tell)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        serve_probes([])
        await pool.close()
        await program.close()


def _tell(task: asyncio.Task[None]) -> None:
    """Log the error with which an exchange ended. Whoever follows the job meets it too, if the engine is gone."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("rollouts are not played any more: %s: %s", type(error).__name__, error)


async def _exchange(
    client: Any, job_id: str, pool: RolloutPool, serve_probes: ServeProbes, changed: asyncio.Event
) -> None:
    quick = 0
    while True:
        changed.clear()
        answers = pool.take_answers()
        handed_out = await client.call("zo_rollouts", job_id, answers)
        if handed_out["rollouts"]:
            serve_probes({(one["model"], one["path"]) for one in handed_out["rollouts"]})
        pool.take(handed_out)
        quick = SOONS if answers else max(0, quick - 1)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), POLL_INTERVAL_S if pool.playing or not quick else SOON_S)
