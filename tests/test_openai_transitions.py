"""Clients that act on a job at once, and a server that is killed in between: one transition at a time, each step once.

The runner, its followers and the store are the real ones; the engine is a model of the engine's queue.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.openai_app import disk_full
from vllm_zo.entrypoints.server.http import errors
from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.http.events import EventHub, event_stream
from vllm_zo.entrypoints.server.http.routes_jobs import list_events
from vllm_zo.entrypoints.server.http.schemas import event
from vllm_zo.entrypoints.server.jobs import follow, runner
from vllm_zo.entrypoints.server.jobs.outcome import Outcome
from vllm_zo.entrypoints.server.jobs.runner import JobRunner
from vllm_zo.entrypoints.server.keys.limits import Quotas
from vllm_zo.entrypoints.server.state.directory import StateDir
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.entrypoints.server.state.store import Store
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.status import FINAL, UNFINISHED, JobStatus

STEPS = 12
"""Of every job: one a call of `Engine.work`."""
LANES = 2
VERBS = ("pause", "resume", "cancel")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "POLL_INTERVAL_S", 0.002)
    monkeypatch.setattr(follow, "WAITING_POLL_INTERVAL_S", 0.004)
    monkeypatch.setattr(runner, "CANCEL_WAIT_S", 5.0)


BASES = ("fingerprint-1", "fingerprint-2")


class Engine:
    """The engine's queue of jobs as the server sees it: two lanes, a step at a time, a log that survives it."""

    errored = False
    waits_for: str | None = None

    def __init__(self, logs: dict[str, int]) -> None:
        self.logs = logs
        """Steps on disk, by job: shared with the engine of a server that was killed before."""
        self.jobs: dict[str, SimpleNamespace] = {}

    async def call(self, method: str, *args: Any) -> Any:
        await asyncio.sleep(0)  # others may act while a call is under way
        return getattr(self, method)(*args)

    def zo_start(self, directory: str, paused: bool) -> None:
        job_id = Path(directory).name
        assert job_id not in self.jobs, f"{job_id} is started twice"
        status = JobStatus.PAUSED if paused else JobStatus.QUEUED
        first = self.logs.get(job_id, 0)
        self.jobs[job_id] = SimpleNamespace(directory=JobDir(Path(directory)), status=status, step=first, records=[])

    def zo_status(self, job_id: str, since: int) -> dict[str, Any]:
        job = self.jobs[job_id]
        answer = {"status": job.status, "error": None, "records": job.records[since:], "next": len(job.records)}
        return {**answer, "published": [], "learning_rate": 1e-3, "waits_for": self.waits_for}

    def zo_stop(self, job_id: str, cancel: bool) -> None:
        if not (job := self.jobs[job_id]).status.ended:
            job.status = JobStatus.CANCELLED

    def zo_pause(self, job_id: str) -> JobStatus:
        job = self.jobs[job_id]
        if job.status.ended:
            raise ConfigError(f"job {job_id} is {job.status}: there is nothing to pause.")
        if job.status != JobStatus.PAUSED:
            job.status = JobStatus.PAUSED if job.status == JobStatus.QUEUED else JobStatus.PAUSING
        return JobStatus(job.status)

    def zo_resume(self, job_id: str) -> None:
        job = self.jobs[job_id]
        if job.status not in (JobStatus.PAUSING, JobStatus.PAUSED):
            raise ConfigError(f"job {job_id} is {job.status}, not paused.")
        job.status = JobStatus.QUEUED if job.status == JobStatus.PAUSED else JobStatus.RUNNING

    def zo_drop(self, job_id: str) -> None:
        assert self.jobs.pop(job_id).status.ended

    def work(self) -> None:
        """One step of the jobs in the lanes."""
        for job in self.jobs.values():
            if (
                job.status == JobStatus.QUEUED
                and sum(j.status == JobStatus.RUNNING for j in self.jobs.values()) < LANES
            ):
                job.status = JobStatus.RUNNING
            if job.status == JobStatus.PAUSING:
                job.status = JobStatus.PAUSED
            if job.status == JobStatus.RUNNING and job.step < STEPS:
                self._step(job)
            elif job.status == JobStatus.RUNNING:  # its log was whole already when it was started again
                job.status = JobStatus.SUCCEEDED

    def _step(self, job: SimpleNamespace) -> None:
        job.step += 1
        record = {
            "step": job.step, "loss": 1.0, "accuracy": 0.5, "loss_plus": 1.0, "loss_minus": 1.0, "coefficients": [1.0],
            "learning_rate": 1e-3, "eps": 1e-2, "finite": True, "tokens": 10 * len(job.records), "seconds": 0.1,
        }  # fmt: skip
        job.records.append(record)
        with job.directory.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.logs[job.directory.job_id] = max(0, job.step - 1)  # the log is behind, by its flush interval
        if job.step == STEPS:
            self.logs[job.directory.job_id] = job.step
            job.status = JobStatus.SUCCEEDED


class Files:
    def keep_result(self, content: bytes, name: str, owner: str) -> dict[str, Any]:
        return {"id": name}


class Names:
    def __init__(self, base: str) -> None:
        self.base = base

    async def announce(self, job: JobRecord, name: str, step: int, kind: str) -> None:
        await asyncio.sleep(0)


class Outcomes(Outcome):
    """No engine, no adapters."""

    def _export_adapter(self, job: JobRecord, step: int) -> bool:
        return True


class Preparer:
    engine = Engine

    def prepare(self, job: JobRecord) -> dict[str, Any]:
        return {"total_steps": STEPS}

    def check_start(self, job: JobRecord) -> None: ...


class Server:
    """One state directory, and whatever serves it now."""

    def __init__(self, root: Path) -> None:
        self.state = StateDir(root)
        for part in ("jobs", "files", "adapters"):
            (root / part).mkdir(parents=True)
        self.store = Store(self.state.database)
        self.logs: dict[str, int] = {}
        self.count = 0
        self.base = BASES[0]
        self._begin()

    def _begin(self) -> None:
        self.threads = ThreadPoolExecutor(8)
        self.engine = Engine(self.logs)
        outcome = Outcomes(self.engine, self.state, self.store, Files(), Names(self.base), None)  # type: ignore[arg-type]
        self.hub = EventHub()
        none = SimpleNamespace(of_job=lambda directory, owner: nullcontext())
        quotas = Quotas(None, self.store)
        self.runner = JobRunner(Preparer(), outcome, self.hub, SimpleNamespace(), none, quotas)  # type: ignore[arg-type]

    def position(self, directory: JobDir) -> int:
        return self.logs.get(directory.job_id, 0)

    async def create(self) -> str:
        asyncio.get_running_loop().set_default_executor(self.threads)
        self.count += 1
        job = JobRecord(
            id=f"ftjob-{self.count}", created_at=0, model="m", organization_id="o", training_file="f", seed=0,
            hyperparameters={"learning_rate": 1e-3, "eval_interval": 4}, method={"type": "supervised"}, request={},
            model_path="m", base=self.base, status=JobStatus.VALIDATING,
        )  # fmt: skip
        self.state.job(job.id).mkdir()
        self.store.add_job(job, event("Created"))
        self.runner.submit(job)
        return job.id

    async def kill(self, base: str | None = None) -> None:
        """And start again, perhaps with another base model. Its tasks end wherever they are; what the engine had not
        logged is lost."""
        self.base = base or self.base
        self.runner.leave_all()
        tasks = list(self.runner._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.threads.shutdown(wait=True)  # what a thread still writes is written before the kill
        for job_id in self.engine.jobs:
            cut_to(JobDir(self.state.job(job_id)).metrics, self.logs.get(job_id, 0))
        self._begin()
        asyncio.get_running_loop().set_default_executor(self.threads)
        await self.runner.resume_all()

    def told(self, job_id: str) -> list[int]:
        events = self.store.all("events", parent=job_id)
        return [event["data"]["step"] for event in events if event["type"] == "metrics"]

    def messages(self, job_id: str) -> list[str]:
        return [event["message"] for event in self.store.all("events", parent=job_id)]


def cut_to(metrics: Path, step: int) -> None:
    """As the engine's recorder does when it goes on behind its log."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


class Clicks(RuleBasedStateMachine):
    """Any clicks in any order, one or two at once, work in between, and kills."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = TemporaryDirectory()
        self.server = Server(Path(self.directory.name) / "state")
        self.ended: dict[str, JobStatus] = {}
        self.patch = pytest.MonkeyPatch()
        for module in (follow, runner):
            self.patch.setattr(module, "log_position", self.server.position)

    def run(self, act: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(act, 20))

    async def click(self, job_id: str, verb: str) -> JobRecord | None:
        try:
            job: JobRecord = await getattr(self.server.runner, verb)(job_id)
        except APIError as error:
            assert error.status in (404, 409), error
            return None
        return job

    async def working(self, seconds: float) -> None:
        """Time passes: the engine steps, followers look."""
        for _ in range(max(1, int(seconds / 0.004))):
            self.server.engine.work()
            await asyncio.sleep(0.004)

    @rule()
    def create(self) -> None:
        if self.server.count < 4:
            self.run(self.server.create())

    @rule(steps=st.integers(1, 5))
    def work(self, steps: int) -> None:
        self.run(self.working(0.004 * steps))

    @rule(job=st.integers(1, 4), verb=st.sampled_from(VERBS))
    def one_click(self, job: int, verb: str) -> None:
        before = self.status(f"ftjob-{job}")
        found = self.run(self.click(f"ftjob-{job}", verb))
        if before in FINAL or before is None:
            assert found is None, f"{verb} of a job that is {before}"
        if verb == "cancel" and found is not None:
            assert found.status == JobStatus.CANCELLED

    @rule(job=st.integers(1, 4), verbs=st.tuples(st.sampled_from(VERBS), st.sampled_from(VERBS)))
    def two_clicks_at_once(self, job: int, verbs: tuple[str, str]) -> None:
        job_id = f"ftjob-{job}"
        before = self.status(job_id)

        async def both() -> list[JobRecord | None]:
            return list(await asyncio.gather(*(self.click(job_id, verb) for verb in verbs)))

        one, other = self.run(both())
        if verbs == ("resume", "resume"):
            assert one is None or other is None, "both were told that they have resumed the job"
        if "cancel" in verbs and before is not None and before not in FINAL and (one or other):
            assert self.status(job_id) in FINAL

    @rule()
    def kill(self) -> None:
        self.run(self.server.kill())

    @rule(base=st.sampled_from(BASES))
    def start_with_another_base(self, base: str) -> None:
        self.run(self.server.kill(base))

    def status(self, job_id: str) -> JobStatus | None:
        try:
            return self.server.store.job(job_id).status
        except APIError:
            return None

    @invariant()
    def what_has_ended_stays_so_and_nothing_fails(self) -> None:
        for job in self.server.store.jobs(JobStatus):
            assert job.status != JobStatus.FAILED, (job.error, self.server.messages(job.id))
            assert self.ended.get(job.id, job.status) == job.status
            if job.status.ended:
                self.ended[job.id] = job.status

    @invariant()
    def the_engine_knows_no_job_of_another_base(self) -> None:
        for job_id in self.server.engine.jobs:
            assert self.server.store.job(job_id).base == self.server.base

    @invariant()
    def every_step_is_told_once_and_in_order(self) -> None:
        for job in self.server.store.jobs(JobStatus):
            told = self.server.told(job.id)
            assert told == list(range(1, len(told) + 1)), self.server.messages(job.id)
            assert self.server.messages(job.id).count("The job has successfully completed") <= 1

    def teardown(self) -> None:
        async def finish() -> None:
            """Whatever has happened, a job can be brought to its end, on a server of its base model."""
            for base in BASES:
                await self.server.kill(base)
                for job in self.server.store.jobs({JobStatus.PAUSED}):
                    await self.click(job.id, "resume")
                for _ in range(500):
                    left = self.server.store.jobs(UNFINISHED - {JobStatus.PAUSED})
                    if not any(job.base == base for job in left):
                        break
                    await self.working(0.004)
            for job in self.server.store.jobs(JobStatus):
                assert job.status in FINAL | {JobStatus.PAUSED}, (job, self.server.messages(job.id))
                if job.status == JobStatus.SUCCEEDED:
                    assert self.server.told(job.id) == list(range(1, STEPS + 1))
            await self.server.runner.stop()

        self.run(finish())
        self.what_has_ended_stays_so_and_nothing_fails()
        self.every_step_is_told_once_and_in_order()
        self.server.store.close()
        self.loop.close()
        self.patch.undo()
        self.directory.cleanup()


TestClicks = Clicks.TestCase
TestClicks.settings = settings(
    max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server(tmp_path / "state")
    for module in (follow, runner):
        monkeypatch.setattr(module, "log_position", made.position)
    yield made
    made.store.close()


async def until(server: Server, job_id: str, status: JobStatus, step: int = 0) -> None:
    for _ in range(1000):
        job = server.store.job(job_id)
        if job.status == status and job.step >= step:
            return
        server.engine.work()
        await asyncio.sleep(0.004)
    raise AssertionError(f"{job} is not {status}: {server.messages(job_id)}")


def test_two_resumes_at_once_are_one(server: Server) -> None:
    async def scenario() -> None:
        job_id = await server.create()
        await until(server, job_id, JobStatus.RUNNING, step=3)
        await server.runner.pause(job_id)
        await until(server, job_id, JobStatus.PAUSED)
        answers = await asyncio.gather(*(server.runner.resume(job_id) for _ in range(4)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, APIError)]
        assert len(refused) == 3 and all("only a paused job can be resumed" in str(error) for error in refused)
        await until(server, job_id, JobStatus.SUCCEEDED)
        assert server.told(job_id) == list(range(1, STEPS + 1))

    asyncio.run(scenario())


def test_a_cancel_that_cannot_be_written_down_has_changed_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        job_id = await server.create()
        await until(server, job_id, JobStatus.RUNNING, step=1)
        with monkeypatch.context() as full:
            change = server.store.change_job

            def refuse(*args: Any, **changes: Any) -> Any:
                if "cancelling" in changes:
                    raise disk_full()
                return change(*args, **changes)

            full.setattr(server.store, "change_job", refuse)
            with pytest.raises(sqlite3.OperationalError):  # the route answers 507
                await server.runner.cancel(job_id)
        await until(server, job_id, JobStatus.SUCCEEDED)

    asyncio.run(scenario())


def test_a_job_that_waits_for_the_stores_own_disk_says_so_and_each_step_is_told_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "FULL_DISK_WAIT_S", 0.01)
    told: list[dict[str, Any]] = []

    async def listen(job_id: str) -> None:
        async for text in event_stream(server.store, server.hub, job_id, None):
            told.extend(json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {"))

    async def scenario() -> None:
        job_id = await server.create()
        listener = asyncio.create_task(listen(job_id))
        await until(server, job_id, JobStatus.RUNNING, step=2)
        with monkeypatch.context() as full:
            full.setattr(server.store, "_write_job", refuse)
            for _ in range(3):
                server.engine.work()
                await asyncio.sleep(0.03)
            waits = server.hub.unwritten[job_id]
            assert waits["message"] == "The job waits: the server's disk is full" and waits["level"] == "warn"
            assert told[-1] == waits, "a client that listens hears of it now"
            page = await list_events(request_to(server), job_id, limit=3)
            assert page["data"][0] == waits and page["has_more"] and len(page["data"]) == 3
            older = await list_events(request_to(server), job_id, after=waits["id"], limit=3)
            assert older["data"][:2] == page["data"][1:], "the pages behind it are those of the store"
        await until(server, job_id, JobStatus.SUCCEEDED)
        await listener
        assert server.told(job_id) == list(range(1, STEPS + 1))
        stored = server.store.all("events", parent=job_id)
        assert [event["message"] for event in stored if "disk" in event["message"]] == [
            "The job waits: the server's disk is full", "The job goes on: the server's disk has room",
        ]  # fmt: skip
        assert not server.hub.unwritten
        assert sorted(event["id"] for event in told) == sorted(event["id"] for event in stored), "each once"

    asyncio.run(scenario())


def test_why_the_engine_waits_is_told_also_while_the_store_is_full(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "FULL_DISK_WAIT_S", 0.01)

    async def scenario() -> None:
        job_id = await server.create()
        await until(server, job_id, JobStatus.RUNNING, step=2)
        with monkeypatch.context() as full:
            full.setattr(server.store, "_write_job", refuse)
            server.engine.waits_for = "seeds.log: No space left on device"
            await asyncio.sleep(0.05)
            assert server.hub.unwritten[job_id]["message"] == "The job waits: seeds.log: No space left on device"
        await asyncio.sleep(0.05)
        server.engine.waits_for = None
        await until(server, job_id, JobStatus.SUCCEEDED)
        said = [message for message in server.messages(job_id) if "waits" in message or "room" in message]
        assert said == ["The job waits: seeds.log: No space left on device", "The job goes on: the disk has room"]
        assert server.told(job_id) == list(range(1, STEPS + 1))

    asyncio.run(scenario())


class Died(BaseException):
    """The server's process is gone: nobody handles this."""


class Failing:
    """The connection of a store whose commit number `at` fails: the disk is full, or the process dies before or after
    it."""

    def __init__(self, connection: Any, at: int, how: str) -> None:
        self.connection, self.at, self.how = connection, at, how
        self.commits = 0
        self.dead = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def execute(self, statement: str, *parameters: Any) -> Any:
        if self.dead and not statement.startswith("SELECT"):
            raise Died
        if statement != "COMMIT":
            return self.connection.execute(statement, *parameters)
        self.commits += 1
        if self.commits != self.at:
            return self.connection.execute(statement)
        if self.how == "full":
            refuse()
        if self.how == "dies after":
            self.connection.execute(statement)
        else:
            self.connection.execute("ROLLBACK")
        self.dead = True
        raise Died


async def whole_life(server: Server) -> int:
    """A job from its creation over a pause to its end, with a client that asks again after an error; restarts the
    server when it has died. Returns how many commits there were."""
    failing: Any = server.store._connection

    async def alive(act: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Do it, again where it failed, until the job is where it should be."""
        for _ in range(3):
            try:
                await asyncio.wait_for(act(), 5)
                return
            except (sqlite3.OperationalError, Died, APIError, TimeoutError):
                if failing.dead:
                    failing.dead = False
                    await server.kill()
        (job,) = server.store.jobs(JobStatus)
        raise AssertionError(f"it does not recover: {job.status} {server.messages(job.id)} {server.engine.jobs}")

    async def reaches(status: JobStatus, step: int = 0) -> None:
        (job,) = server.store.jobs(JobStatus)
        while not failing.dead and not (job.status == status and job.step >= step):
            assert job.status != JobStatus.FAILED, (job.error, server.messages(job.id))
            server.engine.work()
            await asyncio.sleep(0.004)
            (job,) = server.store.jobs(JobStatus)
        if failing.dead:
            raise Died

    async def created() -> None:
        if not server.store.jobs(JobStatus):
            await server.create()

    async def clicked(verb: str, *wanted: JobStatus) -> None:
        (job,) = server.store.jobs(JobStatus)
        if job.status not in wanted:
            await getattr(server.runner, verb)(job.id)

    await alive(created)
    await alive(lambda: reaches(JobStatus.RUNNING, 3))
    await alive(lambda: clicked("pause", JobStatus.PAUSING, JobStatus.PAUSED))
    await alive(lambda: reaches(JobStatus.PAUSED))
    await alive(lambda: clicked("resume", JobStatus.QUEUED, JobStatus.RUNNING))
    await alive(lambda: reaches(JobStatus.SUCCEEDED))
    await server.runner.stop()
    return int(failing.commits)


def live_with_failures(root: Path, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "FULL_DISK_WAIT_S", 0.01)
    for how in ("full", "dies before", "dies after"):
        commits, at = 10**6, 1
        while at <= commits:
            server = Server(root / f"{how} {at}")
            for module in (follow, runner):
                monkeypatch.setattr(module, "log_position", server.position)
            server.store._connection = Failing(server.store._connection, at, how)  # type: ignore[assignment]
            commits = asyncio.run(whole_life(server))
            (job,) = server.store.jobs(JobStatus)
            assert server.told(job.id) == list(range(1, STEPS + 1)), (how, at, server.messages(job.id))
            assert server.messages(job.id).count("The job has successfully completed") == 1
            server.store.close()
            at += every


def test_a_store_that_fails_at_some_commit_loses_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live_with_failures(tmp_path, every=6, monkeypatch=monkeypatch)


@pytest.mark.slow
def test_a_store_that_fails_at_any_commit_loses_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live_with_failures(tmp_path, every=1, monkeypatch=monkeypatch)


def refuse(*args: Any, **changes: Any) -> Any:
    raise disk_full()


def request_to(server: Server) -> Any:
    """What the routes look at of a request."""
    zo = SimpleNamespace(store=server.store, hub=server.hub)
    return SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(zo=zo)))


def test_a_job_that_was_told_to_end_ends_as_cancelled_whatever_else_happens(server: Server) -> None:
    async def scenario() -> None:
        job_id = await server.create()
        await until(server, job_id, JobStatus.RUNNING, step=2)
        server.store.change_job(job_id, cancelling=True)  # written down, and then the server was killed
        await server.kill()
        assert server.store.job(job_id).status == JobStatus.CANCELLED and job_id not in server.engine.jobs

        failing = await server.create()
        await until(server, failing, JobStatus.RUNNING, step=2)
        stop = server.engine.zo_stop

        def fail(job_id: str, cancel: bool) -> None:
            stop(job_id, cancel)
            server.engine.jobs[job_id].status = JobStatus.FAILED  # the disk is full, say

        server.engine.zo_stop = fail  # type: ignore[method-assign]
        assert (await server.runner.cancel(failing)).status == JobStatus.CANCELLED

    asyncio.run(scenario())


def test_a_paused_job_is_paused_after_a_restart_and_takes_no_step(server: Server) -> None:
    async def scenario() -> None:
        job_id = await server.create()
        await until(server, job_id, JobStatus.RUNNING, step=3)
        await server.runner.pause(job_id)
        await server.kill()
        step = server.store.job(job_id).step
        for _ in range(5):
            server.engine.work()
        assert server.store.job(job_id).status == JobStatus.PAUSED
        assert server.engine.jobs[job_id].records == [] and server.store.job(job_id).step == step
        await server.runner.resume(job_id)
        await until(server, job_id, JobStatus.SUCCEEDED)
        assert server.told(job_id) == list(range(1, STEPS + 1))

    asyncio.run(scenario())


def test_jobs_of_another_base_wait_with_a_reason_and_go_on_with_theirs(server: Server) -> None:
    async def run() -> None:
        job_id = await server.create()
        await asyncio.sleep(0.05)
        await server.kill(BASES[1])
        job = server.store.job(job_id)
        assert job.status == JobStatus.QUEUED and not server.engine.jobs
        assert f"fingerprint {BASES[0]}, and this server's has {BASES[1]}" in server.messages(job_id)[-1]
        assert (await server.runner.pause(job_id)).status == JobStatus.PAUSED
        assert (await server.runner.resume(job_id)).status == JobStatus.QUEUED
        other = await server.create()
        await server.kill(BASES[0])
        assert set(server.engine.jobs) == {job_id}
        await server.runner.cancel(other)
        assert server.store.job(other).status == JobStatus.CANCELLED
        await server.runner.stop()

    asyncio.run(run())
