"""A cluster's engines on Ray, as the driver sees them: the counterpart of `cluster.LocalHost`."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
import uuid
from typing import Any

import ray

from vllm_zo.entrypoints.cluster.messages import Call, Raised, StartEngine
from vllm_zo.entrypoints.cluster.on_ray import connect
from vllm_zo.entrypoints.cluster.on_ray.connect import NAMESPACE
from vllm_zo.entrypoints.cluster.on_ray.coordinator_actor import CoordinatorActor, engine_names
from vllm_zo.errors import JobError, ZOError
from vllm_zo.jobs.directory import JobDir

logger = logging.getLogger("vllm.zo.cluster")

HEAD = "node:__internal_head__"
"""Ray's name of a resource that only the head node has."""
POLL_S = 0.05
"""Seconds between two questions for new records."""
HERE_S = 5.0
"""Seconds between two signs of life of a driver."""
NOTICE_S = 30.0
"""After so long say which engines have not started, in seconds."""
END_S = 20.0
"""How long the end of a job may take when the cluster is closed, in seconds."""


class RayEngine:
    """One engine, between jobs."""

    def __init__(self, name: str, actor_name: str) -> None:
        self.name, self.actor_name = name, actor_name
        self._numbers = itertools.count()
        self._number = 0

    @property
    def actor(self) -> Any:
        """Raises ValueError: it has died for good."""
        return ray.get_actor(self.actor_name, NAMESPACE)

    def send(self, message: Call) -> None:
        self._number = next(self._numbers)
        self._ask("call", self._number, message)

    def answer(self) -> Any:
        """The answer of the call that was sent last.

        Raises:
            JobError: the engine has died.
            Exception: what the method raised.
        """
        while (answer := self._ask("answer", self._number)) is None:
            time.sleep(POLL_S / 5)
        if isinstance(answer, Raised):
            raise answer.error
        return answer.value

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the engine. Raises what `answer` raises."""
        self.send(Call(method, args))
        return self.answer()

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self.actor, method).remote(*args))
        except (ray.exceptions.RayActorError, ValueError) as error:
            raise JobError(f"{self.name} has died: {str(error).strip().splitlines()[0]}") from error


class RayHost:
    """The driver's part of a cluster on Ray. What it starts outlives it while a job runs, and no longer.

    Args:
        address: see `connect.connect`.
        ranks: workers of an engine, tensor-parallel ranks and pipeline stages.
        kv_cache: see `CoordinatorActor`.

    Raises:
        ConfigError: there is no such Ray cluster, it is too small, or an engine refuses its options or the model.
        JobError: an engine dies while it starts.
    """

    def __init__(
        self, start: StartEngine, engines: int, address: str, ranks: int, *, min_engines: int, kv_cache: bool
    ) -> None:
        connect.connect(address)
        share = connect.share_of(engines, ranks)
        environment = connect.environment(share, ranks)
        self.name = f"zo-{uuid.uuid4().hex[:8]}"
        self.engines = [RayEngine(*names) for names in engine_names(self.name, engines).items()]
        self._coordinator = (
            ray.remote(CoordinatorActor)
            .options(
                name=self.name,
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                max_task_retries=-1,  # a second call does no harm
                num_cpus=0,
                resources={HEAD: 0.001},
            )
            .remote(self.name, engines, min_engines, start, share, environment, kv_cache)
        )
        self._closed = threading.Event()
        threading.Thread(target=self._stay_known, name="zo-driver", daemon=True).start()
        try:
            self._await_start()
        except BaseException:
            self.close()
            raise

    def _await_start(self) -> None:
        began, told = time.monotonic(), False
        while True:
            up = self._ask("up")
            for name, state in up.items():
                if isinstance(state, ZOError):
                    raise state
                if isinstance(state, Exception):
                    raise JobError(f"{name} does not start: {state}")
            waiting = [name for name, state in up.items() if not state]
            if not waiting:
                return
            if not told and time.monotonic() - began > NOTICE_S:
                told = True
                logger.info("waiting for %s: loading, or no node has room (`ray status`)", ", ".join(waiting))
            time.sleep(POLL_S)

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._coordinator, method).remote(*args))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, ZOError) else error from None
        except ray.exceptions.RayActorError as error:
            raise JobError(f"cluster {self.name} was ended, by `vllm-zo stop` or by Ray: {error}") from error

    def _stay_known(self) -> None:
        while not self._closed.wait(HERE_S):
            with contextlib.suppress(ray.exceptions.RayError):  # `_ask` tells
                self._coordinator.here.remote()

    def alive(self) -> list[RayEngine]:
        """The engines that are up, after waiting for those that are starting again."""
        while True:
            up = self._ask("up")
            engines = [engine for engine in self.engines if up[engine.name] is True]
            if engines:
                return engines
            if not any(_exists(engine) for engine in self.engines):
                raise JobError("no engine is left: each has died too often; make a new Cluster.")
            time.sleep(POLL_S)

    def start(self, directory: JobDir) -> RayClient:
        return RayClient(self._ask, directory)

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._coordinator.leave.remote(True), timeout=END_S)
        actors = [self._coordinator]
        for engine in self.engines:
            with contextlib.suppress(ValueError):
                actors.append(engine.actor)
        for actor in actors:  # the coordinator first: it would make engines
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor, no_restart=True)


def _exists(engine: RayEngine) -> bool:
    try:
        return bool(engine.actor)
    except ValueError:
        return False


class RayClient:
    """Follows a run whose coordinator is an actor. The job moves by itself."""

    def __init__(self, ask: Any, directory: JobDir) -> None:
        self._ask, self._directory, self._run = ask, directory, uuid.uuid4().hex

    def call(self, method: str, *args: Any) -> Any:
        """What an engine's method of that name does, done by the coordinator."""
        if method == "zo_status":
            return self._ask("poll", self._run, str(self._directory.path), args[1])
        assert method == "zo_stop"
        return self._ask("stop", self._run, args[1])

    def advance(self) -> bool:
        time.sleep(POLL_S)
        return True
