"""The jobs of a server with several engines, with engines that have no model: queue, pause, resume, cancel, crash."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.simulated_cluster import make_job
from tests.fake_cluster import FakeEngine
from vllm_zo import ConfigError, ZOTrainingConfig
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.cluster.protocol import Stopped
from vllm_zo.entrypoints.cluster.data_parallel import DataParallelClient
from vllm_zo.entrypoints.cluster.seats import packed, unpacked
from vllm_zo.jobs.directory import JobDir

STATS = {"slots": {"total": 4, "in_use": 4}, "tokens": {"training": 5, "serving": 7}, "pace": {"slowdown": 1.5}}


class FakeCore:
    """vLLM's data-parallel client with two engines. Each job has a fake engine in each; `hold` stops their answers."""

    def __init__(self) -> None:
        self.core_engines = [b"0", b"1"]
        self.engines: dict[tuple[bytes, str], FakeEngine] = {}
        self.answers: dict[bytes, asyncio.Queue[Any]] = {key: asyncio.Queue() for key in self.core_engines}
        self.told = 0

    def ensure_alive(self) -> None:
        pass

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> Any:
        if method == "zo_stats":
            return STATS
        if method == "zo_hear":
            return packed([await self.answers[engine].get()])
        for job_id, message in unpacked(*args):
            self.told += 1
            fake = self.engines.setdefault((engine, job_id), FakeEngine())
            for answer in fake.tell(message):
                await asyncio.sleep(0)
                self.answers[engine].put_nowait((job_id, answer))


@asynccontextmanager
async def client(concurrent_jobs: int = 1) -> AsyncIterator[tuple[DataParallelClient, FakeCore]]:
    core = FakeCore()
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype="torch.float32", quantization=None),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        cache_config=SimpleNamespace(block_size=16),
    )
    engine = SimpleNamespace(engine_core=core, vllm_config=config)
    made = DataParallelClient(engine, ZOTrainingConfig(concurrent_jobs=concurrent_jobs))
    made.start()
    try:
        yield made, core
    finally:
        made.close()


async def until(client: DataParallelClient, job: JobDir, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    for _ in range(2000):
        status = await client.call("zo_status", job.job_id, 0)
        if holds(status):
            return status
        await asyncio.sleep(0.005)
    raise AssertionError(f"never: {status}")


def is_(status: str) -> Callable[[dict[str, Any]], bool]:
    return lambda now: bool(now["status"] == status)


def log_of(job: JobDir) -> bytes:
    return job.log.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    job = make_job(tmp_path_factory.mktemp("undisturbed") / "job", steps=20)

    async def run() -> None:
        async with client() as (front, core):
            await front.call("zo_start", str(job.path))
            status = await until(front, job, is_("succeeded"))
            assert status["step"] == 20 and [r["step"] for r in status["records"] if "loss" in r][-1] == 20
            assert [(key, fake.scored > 0) for (key, _), fake in core.engines.items()] == [(b"0", True), (b"1", True)]

    asyncio.run(run())
    return log_of(job)


def test_jobs_queue_for_a_lane_and_both_succeed(tmp_path: Path, undisturbed: bytes) -> None:
    jobs = [make_job(tmp_path / name, steps=20) for name in ("a", "b")]

    async def run() -> None:
        async with client() as (front, _):
            for job in jobs:
                await front.call("zo_start", str(job.path))
            await until(front, jobs[0], is_("running"))
            assert (await front.call("zo_status", "b", 0))["status"] == "queued"
            stats = await front.call("zo_stats")
            assert stats["slots"] == {"total": 8, "in_use": 8} and stats["tokens"] == {"training": 10, "serving": 14}
            for job in jobs:
                await until(front, job, is_("succeeded"))
            with pytest.raises(ConfigError, match="'c' is unknown"):
                await front.call("zo_status", "c", 0)

    asyncio.run(run())
    assert [log_of(job) for job in jobs] == [undisturbed, undisturbed]


def test_two_lanes_take_two_jobs(tmp_path: Path, undisturbed: bytes) -> None:
    jobs = [make_job(tmp_path / name, steps=20) for name in ("a", "b", "c")]

    async def run() -> None:
        async with client(concurrent_jobs=2) as (front, _):
            for job in jobs:
                await front.call("zo_start", str(job.path))
            held: set[tuple[str, ...]] = set()
            while front._queue.unfinished:
                held.add(tuple(sorted(lane.job.job_id for lane in front._queue.lanes if lane.job is not None)))
                await asyncio.sleep(0)
            assert any(len(together) == 2 for together in held)
            assert all(len(together) == len(set(together)) for together in held), "a lane each"
            for job in jobs:
                assert (await front.call("zo_status", job.job_id, 0))["status"] == "succeeded"

    asyncio.run(run())
    assert [log_of(job) for job in jobs] == [undisturbed] * 3


def test_a_paused_job_gives_its_lane_away_and_goes_on_where_it_was(tmp_path: Path, undisturbed: bytes) -> None:
    first, second = (make_job(tmp_path / name, steps=20) for name in ("a", "b"))

    async def run() -> None:
        async with client() as (front, core):
            await front.call("zo_start", str(first.path))
            await front.call("zo_start", str(second.path))
            await until(front, first, lambda now: now["step"] >= 5)
            assert await front.call("zo_pause", "a") in ("pausing", "paused")
            paused = await until(front, first, is_("paused"))
            await until(front, second, is_("succeeded"))
            assert (await front.call("zo_status", "a", 0))["step"] == paused["step"] < 20
            assert core.engines[b"0", "a"].joins == [0]
            await front.call("zo_resume", "a")
            await until(front, first, is_("succeeded"))
            assert core.engines[b"0", "a"].joins == [0, 2], "by another coordinator"

    asyncio.run(run())
    assert log_of(first) == log_of(second) == undisturbed


def test_pausing_and_resuming_at_any_moment_changes_nothing(tmp_path: Path, undisturbed: bytes) -> None:
    job = make_job(tmp_path / "a", steps=20)

    async def run() -> None:
        async with client() as (front, _):
            await front.call("zo_start", str(job.path), True)
            assert (await front.call("zo_status", "a", 0))["status"] == "paused"
            pauses = 0
            try:
                for number in range(20):
                    await front.call("zo_resume", "a")
                    for _ in range(3 * number):
                        await asyncio.sleep(0)
                    await front.call("zo_pause", "a")
                    pauses += 1
                    await asyncio.sleep(0.002 * (number % 3))
                await front.call("zo_resume", "a")
            except ConfigError as error:
                assert "is succeeded" in str(error), "the one reason why a job cannot be paused or resumed"
            assert pauses > 2
            await until(front, job, is_("succeeded"))

    asyncio.run(run())
    assert log_of(job) == undisturbed


def test_a_cancelled_job_keeps_its_last_state_also_when_it_was_paused(tmp_path: Path) -> None:
    running, paused = (make_job(tmp_path / name, validation=0, steps=100_000) for name in ("a", "b"))

    async def run() -> None:
        async with client(concurrent_jobs=2) as (front, _):
            for job in (running, paused):
                await front.call("zo_start", str(job.path))
                await until(front, job, lambda now: now["step"] >= 5)
            await front.call("zo_pause", "b")
            await until(front, paused, is_("paused"))
            for job in (running, paused):
                await front.call("zo_stop", job.job_id, True)
                status = await until(front, job, is_("cancelled"))
                assert status["published"] == [status["step"]] and read_seed_log(job.log).num_steps == status["step"]
            assert paused.published() == [status["step"]], "written here: no engine has its state"

    asyncio.run(run())


def test_the_jobs_of_a_server_that_ends_go_on_in_the_next_one(tmp_path: Path, undisturbed: bytes) -> None:
    job = make_job(tmp_path / "a", steps=20)

    async def run(steps: int | None) -> None:
        async with client() as (front, _):
            await front.call("zo_start", str(job.path))
            await until(front, job, is_("succeeded") if steps is None else lambda now: now["step"] >= steps)

    for steps in (5, 15, None):
        asyncio.run(run(steps))
    assert log_of(job) == undisturbed


def test_an_engine_that_drops_a_job_fails_it_with_the_reason(tmp_path: Path) -> None:
    job = make_job(tmp_path / "a", steps=100_000)

    async def run() -> None:
        async with client() as (front, core):
            await front.call("zo_start", str(job.path))
            await until(front, job, lambda now: now["step"] >= 5)
            core.answers[b"1"].put_nowait(("a", Stopped(0, "RuntimeError: the objective has a bug")))
            status = await until(front, job, is_("failed"))
            assert status["error"] == "engine 1: RuntimeError: the objective has a bug"

    asyncio.run(run())


def test_a_job_that_would_write_the_base_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path / "a", update_space="fold")

    async def run() -> None:
        async with client() as (front, _):
            with pytest.raises(ConfigError, match="each of the 2 engines has; start the server with"):
                await front.call("zo_start", str(job.path))

    asyncio.run(run())
