"""Jobs on all engines of a server (`--data-parallel-size N`): their queue, and a coordinator for each that runs.

It answers the calls that `AsyncEngineClient` passes on to the only engine there is, so whoever follows jobs need not
know how many engines there are. vLLM starts the engines, and ends all of them, and the server, when one dies.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.checkpoint.snapshot import save_snapshot
from vllm_zo.cluster.coordinator import Coordinator
from vllm_zo.cluster.protocol import ToEngine
from vllm_zo.commands import Publish
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.engine.job import Job
from vllm_zo.engine.job_queue import JobQueue
from vllm_zo.engine.load_job import EngineFacts, load_job
from vllm_zo.engine.throttle import Throttle
from vllm_zo.entrypoints.cluster.seats import packed, unpacked
from vllm_zo.errors import ConfigError, ZOError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.status import JobStatus

logger = logging.getLogger("vllm.zo.cluster")

TURN_S = 0.1
"""How often coordinators look at the clock and at a disk that was full, in seconds. Answers of engines come at once."""


class DataParallelClient:
    """Belongs to the event loop of an `AsyncLLM` with several engines. Its public coroutines are what `call` calls."""

    def __init__(self, engine: Any, zo: ZOTrainingConfig) -> None:
        config = engine.vllm_config
        self._core = engine.engine_core
        self._engines = {f"engine {rank}": key for rank, key in enumerate(self._core.core_engines)}
        self._facts = EngineFacts.of(zo, config.model_config, config.scheduler_config.max_num_seqs)
        self._throttle = Throttle(zo)
        """Asked for the time of day only: each engine has one of its own."""
        self._queue = JobQueue(zo.concurrent_jobs, zo.slots, config.cache_config.block_size)
        self._coordinators: dict[str, Coordinator] = {}
        """Of the jobs that have a lane, and of those that engines have yet to forget."""
        self._entering: list[Job] = []
        """Jobs that have a lane, but no coordinator yet."""
        self._epochs = itertools.count()
        self._changing = asyncio.Lock()
        """Held while a job is begun (which reads its examples), paused, resumed or stopped."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._broken: Exception | None = None
        """Why an engine cannot be heard any more, though its process may live."""

    async def call(self, method: str, *args: Any) -> Any:
        """What `AsyncEngineClient.call` does, with the same methods, answers and errors."""
        self._core.ensure_alive()
        if self._broken is not None:
            raise self._broken
        return await getattr(self, method)(*args)

    def start(self) -> None:
        """Begin to listen to the engines."""
        for name in self._engines:
            self._spawn(self._listen(name))
        self._spawn(self._watch())

    def close(self) -> None:
        """Complete the logs, so that the jobs can go on after the next start of the server."""
        for task in self._tasks:
            task.cancel()
        self._queue.close()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- what a front end calls ---------------------------------------------------------------------------------------

    async def zo_start(self, job_dir: str, paused: bool = False) -> dict[str, Any]:
        # One shard for a job that was made when the server had one engine.
        job: Job = await asyncio.to_thread(load_job, JobDir(Path(job_dir)), self._facts, None, shards=1)
        if job.space == "fold":
            raise ConfigError(
                f"job {job.job_id} (update_space='fold') writes the base, which each of the {len(self._engines)} "
                "engines has; start the server with --data-parallel-size 1."
            )
        self._queue.add(job)
        if paused:
            self._queue.pause(job.job_id)
        self._turn()
        return job.summary()

    async def zo_status(self, job_id: str, since: int = 0) -> dict[str, Any]:
        status = self._queue.status(job_id, since)
        if (coordinator := self._coordinators.get(job_id)) is not None:
            status["engines"] = coordinator.stats()
        if status["status"] == JobStatus.RUNNING and status["waits_for"] is None:
            status["waits_for"] = self._throttle.closed
        return status

    async def zo_pause(self, job_id: str) -> str:
        async with self._changing:
            self._queue.pause(job_id)
        self._turn()
        return self._queue.get(job_id).status.value

    async def zo_resume(self, job_id: str) -> None:
        async with self._changing:
            self._queue.resume(job_id)
        self._turn()

    async def zo_stop(self, job_id: str, cancel: bool) -> None:
        async with self._changing:
            job = self._queue.get(job_id)
            coordinator = self._coordinators.get(job_id)
            if coordinator is not None and not coordinator.dismissed:
                coordinator.stop(cancel=cancel)
            elif not cancel:
                job.finish_early()
            elif not job.status.ended:
                await self._finish(job, JobStatus.CANCELLED)
        self._turn()

    async def zo_drop(self, job_id: str) -> None:
        self._queue.drop(job_id)

    async def zo_stats(self) -> dict[str, Any]:
        engines = [await self._call(name, "zo_stats") for name in self._engines]
        slots = {key: sum(stats["slots"][key] for stats in engines) for key in ("total", "in_use")}
        tokens = {use: sum(stats["tokens"][use] for stats in engines) for use in engines[0]["tokens"]}
        pace = _together(stats["pace"] for stats in engines)
        stats = {**self._queue.stats(), "slots": slots, "tokens": tokens, "pace": pace}
        for job_id, coordinator in self._coordinators.items():
            if job_id in stats["jobs"]:
                stats["jobs"][job_id]["engines"] = coordinator.stats()
        return stats

    async def zo_restore_base(self, job_id: str) -> None:
        raise ConfigError(f"job {job_id}: no job changes the base of a server with several engines.")

    async def _call(self, name: str, method: str, *args: Any) -> Any:
        return await self._core._call_utility_async(method, *args, engine=self._engines[name])

    # --- jobs come and go ---------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Let jobs enter lanes, send what there is to send, and take jobs that have ended out of the queue."""
        # One that has a lane counts as waiting until it has begun, and would be given a second one.
        if not any(lane.job is not None and lane.job.status == JobStatus.QUEUED for lane in self._queue.lanes):
            self._entering += self._queue.entering(serving=False)
        for job in [job for job in self._entering if job.job_id not in self._coordinators]:
            self._entering.remove(job)
            self._spawn(self._begin(job))
        post: dict[str, list[tuple[str, ToEngine]]] = defaultdict(list)
        for job_id, coordinator in list(self._coordinators.items()):
            self._queue.rest(coordinator.job)
            for name, message in coordinator.messages():
                post[name].append((job_id, message))
            if coordinator.job.status.ended and job_id in self._queue.unfinished:
                self._leave(coordinator.job)
            if coordinator.ended:
                del self._coordinators[job_id]
        for name, messages in post.items():
            self._spawn(self._tell(name, packed(messages)))  # tasks begin, and so send, in the order of their making

    async def _begin(self, job: Job) -> None:
        """Give a job that has a lane its coordinator, unless it was paused or cancelled meanwhile."""
        async with self._changing:
            if self._queue.lane_of(job) is None or job.status != JobStatus.QUEUED:
                return
            try:
                # In a thread: it reads the examples.
                coordinator = await asyncio.to_thread(Coordinator, job, next(self._epochs))
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                await self._finish(job, JobStatus.FAILED, f"{type(error).__name__}: {error}")
                return
            self._coordinators[job.job_id] = coordinator
            for name in self._engines:
                coordinator.arrive(name)
        self._turn()

    async def _finish(self, job: Job, status: JobStatus, error: str | None = None) -> None:
        """End a job that no engine has."""
        job.end(status, error)
        self._leave(job)
        for command in job.at_end():
            if isinstance(command, Publish):  # no worker has its state any more
                await asyncio.to_thread(_publish, job.directory, command)
        job.recorder.summarise(job.summary())
        job.recorder.forget()
        job.forget_examples()

    def _leave(self, job: Job) -> None:
        self._queue.remove(job)
        why = job.summary()["error"]
        log = logger.error if job.status == JobStatus.FAILED else logger.info
        log("job %s %s at step %d%s", job.job_id, job.status, job.recorded, f": {why}" if why else "")

    # --- messages -----------------------------------------------------------------------------------------------------

    async def _listen(self, name: str) -> None:
        while True:
            try:
                messages = unpacked(await self._call(name, "zo_hear"))
            except Exception as error:  # the server ends, or it is an error of vLLM's: whoever calls next gets it
                self._break(name, error)
                return
            for job_id, message in messages:
                if (coordinator := self._coordinators.get(job_id)) is not None:
                    coordinator.receive(name, message)
            self._turn()

    async def _tell(self, name: str, messages: bytes) -> None:
        try:
            await self._call(name, "zo_tell", messages)
        except Exception as error:  # as in `_listen`
            self._break(name, error)

    def _break(self, name: str, error: Exception) -> None:
        if self._broken is None:
            self._broken = error
            logger.warning("%s cannot be heard any more: %s: %s", name, type(error).__name__, error)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TURN_S)
            self._turn()


def _publish(directory: JobDir, command: Publish) -> None:
    """Write a version as the workers do."""
    log = read_seed_log(directory.log)
    snapshot = directory.snapshot if directory.snapshot.exists() else None
    try:
        save_snapshot(command.path, rebuild_state(log, command.version, snapshot), command.version)
    except ZOError as error:
        logger.warning("job %s: step %d is not published: %s", command.job_id, command.version, error)


def _together(paces: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """The pace of all engines: their budgets and stops together, the worst slowdown, the mean share of idle time."""
    known: dict[str, list[float]] = defaultdict(list)
    for pace in paces:
        for key, value in pace.items():
            if value is not None:
                known[key].append(value)
    join: dict[str, Callable[[list[float]], float]]
    join = {"budget_tokens": sum, "slowdown": max, "idle_used": fmean, "stops": sum}
    return {key: join[key](values) for key, values in known.items()}
