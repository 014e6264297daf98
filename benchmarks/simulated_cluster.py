"""The real coordinator with engines that are not real, a network that misbehaves, and a virtual clock.

`tests/test_coordinator.py` runs it with engines that check what they are told; `cluster.py --simulate` with a thousand.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vllm_zo import Classification, JobConfig, LoZO, ZOTrainingConfig
from vllm_zo.cluster.coordinator import Coordinator
from vllm_zo.cluster.protocol import FromEngine, Score, Scored, ToEngine
from vllm_zo.engine.load_job import EngineFacts, load_job
from vllm_zo.jobs.directory import JobDescription, JobDir
from vllm_zo.methods.plan import ModuleShape
from vllm_zo.objectives.base import EncodedExample, ScoringSequence

FACTS = EngineFacts(ZOTrainingConfig(), "float32", None, max_sequences=4)
MODULES = (ModuleShape("layer", 4, 4),)
OBJECTIVE = Classification("{sentence} It was", [" bad", " good"])
OPTIONS: dict[str, Any] = {
    "objective": OBJECTIVE, "method": LoZO(queries=2, interval=3, eps=1e-2), "shards": 4, "steps": 7, "batch_size": 3,
    "learning_rate": 1e-2, "lr_schedule": "linear", "eval_interval": 3, "seed": 5,
}  # fmt: skip


def make_job(path: Path, validation: int = 6, **options: Any) -> JobDir:
    """A job's directory, with examples that no tokenizer has made. Its model is a name: nothing reads it."""

    def example(index: int) -> EncodedExample:
        sequence = ScoringSequence(tuple(range(3 + index % 4)), (2 + index % 4,), (5, 6), "labels")
        return EncodedExample((sequence,), gold=index % 2)

    directory = JobDir(path)
    config = JobConfig(**{**OPTIONS, **options})
    examples = [example(index) for index in range(max(20, config.batch_size))]
    directory.write(JobDescription("no-model", config), examples, examples[:validation])
    return directory


def start(directory: JobDir, epoch: int = 0, clock: Callable[[], float] = lambda: 0.0) -> Coordinator:
    return Coordinator(load_job(directory, FACTS, None), epoch, clock)


class Engine(Protocol):
    """Answers in the order in which it is told, as a `MemberJob` in a real engine does."""

    def tell(self, message: ToEngine) -> list[FromEngine]: ...


@dataclass
class Trouble:
    """What goes wrong, each with a probability for one message, or with a mean time between two of them in seconds."""

    lost: float = 0.0
    """Answers only: a message to an engine arrives, or the engine is put out."""
    twice: float = 0.0
    latency_s: tuple[float, float] = (0.001, 0.001)
    work_s: tuple[float, float] = (0.01, 0.01)
    death_s: float = float("inf")
    restart_s: float = 0.5
    crash_s: float = float("inf")
    """Of the coordinator."""


@dataclass(order=True)
class Event:
    at: float
    number: int
    action: Callable[[], None] = field(compare=False)


class Network:
    """Drives a coordinator and engines to the end of a job, in virtual time.

    Args:
        counts_coordinator: the time that the coordinator really takes passes on the virtual clock, too.
    """

    def __init__(
        self,
        directory: JobDir,
        engines: int,
        trouble: Trouble,
        make_engine: Callable[[], Engine],
        seed: int = 0,
        counts_coordinator: bool = False,
        limit_s: float = 1e6,
    ) -> None:
        self.directory, self.trouble, self.random, self.limit_s = directory, trouble, random.Random(seed), limit_s
        self.now, self.epoch = 0.0, 0
        self.deaths = self.crashes = self.sent = 0
        self._make_engine, self._counts = make_engine, counts_coordinator
        self._events: list[Event] = []
        self._numbers = itertools.count()
        self._free_at: dict[str, float] = {}
        """When the last message to an engine has arrived and it is done with it: a pipe keeps their order."""
        self.engines: dict[str, Engine] = {}
        self.coordinator = start(directory, 0, lambda: self.now)
        for index in range(engines):
            self._spawn(f"engine {index}")
        self._plan_crash()

    def run(self) -> Coordinator:
        self._send()
        while not self.coordinator.ended:
            wake = self.coordinator.wakes_at()
            assert self._events or wake is not None, "nothing will ever happen again"
            if self._events and (wake is None or self._events[0].at <= wake):
                event = heapq.heappop(self._events)
                self.now = max(self.now, event.at)
                event.action()
            else:
                assert wake is not None
                self.now = max(self.now, wake)
            assert self.now < self.limit_s, "the job takes for ever"
            self._send()
        return self.coordinator

    # --- what a subclass may draw in another way ----------------------------------------------------------------------

    def latency(self, name: str) -> float:
        return self.random.uniform(*self.trouble.latency_s)

    def work(self, name: str, score: Score) -> float:
        return self.random.uniform(*self.trouble.work_s)

    # --- engines ------------------------------------------------------------------------------------------------------

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, Event(self.now + seconds, next(self._numbers), action))

    def _spawn(self, name: str) -> None:
        engine = self.engines[name] = self._make_engine()
        self._free_at[name] = self.now
        self.coordinator.arrive(name)
        if self.trouble.death_s < float("inf"):
            self._later(self.random.expovariate(1 / self.trouble.death_s), lambda: self._kill(name, engine))

    def _kill(self, name: str, engine: Engine) -> None:
        if self.engines.get(name) is not engine or self.coordinator.job.status.ended:
            return
        self.deaths += 1
        del self.engines[name]
        self.coordinator.leave(name)
        self._later(self.random.uniform(0, 2 * self.trouble.restart_s), lambda: self._respawn(name))

    def _respawn(self, name: str) -> None:
        if name not in self.engines and not self.coordinator.job.status.ended:
            self._spawn(name)

    def _plan_crash(self) -> None:
        if self.trouble.crash_s < float("inf"):
            self._later(self.random.expovariate(1 / self.trouble.crash_s), self._crash)

    def _crash(self) -> None:
        """Kill the coordinator. What it has not written is lost, and what it has sent still arrives."""
        if self.coordinator.job.status.ended:
            return
        self.crashes += 1
        left = {path: path.read_bytes() for path in (self.directory.log, self.directory.metrics) if path.exists()}
        self.coordinator.job.recorder.close()  # frees the lock, as the system does
        for path, content in left.items():
            path.write_bytes(content)
        self.epoch += 1
        self.coordinator = start(self.directory, self.epoch, lambda: self.now)
        for name in self.engines:
            self.coordinator.arrive(name)
        self._plan_crash()

    # --- messages -----------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        began = time.perf_counter()
        messages = self.coordinator.messages()
        self._spent(began)
        self.sent += len(messages)
        for name, message in messages:
            engine = self.engines[name]
            work = self.work(name, message) if isinstance(message, Score) else 0.0
            self._free_at[name] = max(self._free_at[name], self.now + self.latency(name)) + work
            self._later(self._free_at[name] - self.now, lambda n=name, e=engine, m=message: self._arrives(n, e, m))

    def _spent(self, began: float) -> None:
        if self._counts:
            self.now += time.perf_counter() - began

    def _arrives(self, name: str, engine: Engine, message: ToEngine) -> None:
        if self.engines.get(name) is not engine:
            return
        for answer in engine.tell(message):
            copies = 1 + (self.random.random() < self.trouble.twice)
            if isinstance(answer, Scored) and self.random.random() < self.trouble.lost:
                copies = 0
            for _ in range(copies):
                self._later(self.latency(name), lambda a=answer: self._hears(name, a))

    def _hears(self, name: str, answer: FromEngine) -> None:
        began = time.perf_counter()
        self.coordinator.receive(name, answer)
        self._spent(began)
