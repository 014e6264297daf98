"""The actor that owns a cluster on Ray: it makes the engines, runs the jobs that a driver gives it, and ends them all.

It is named and detached, and Ray starts it again on the head node when it dies. Then it finds the engines by name and
the job by what they know of it, and goes on from the log. One thread does all work, one thing after another; the calls
of others only put something on its list.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import queue
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from vllm_zo.cluster.protocol import Join, Stopped
from vllm_zo.entrypoints.cluster.messages import StartEngine
from vllm_zo.entrypoints.cluster.on_ray.connect import NAMESPACE, Share
from vllm_zo.entrypoints.cluster.on_ray.lines import Crashed, Here, Line, end_this_actor
from vllm_zo.entrypoints.cluster.on_ray.run import SHARED, HostedRun
from vllm_zo.errors import JobError, ZOError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.status import JobStatus

logger = logging.getLogger("vllm.zo.cluster")

ENGINE = "vllm_zo.entrypoints.cluster.on_ray.engine_actor"
"""The program of an engine's process. By its name, as in `local.py`: it needs all that this process does without."""
SILENT_S = 300.0
"""After so long without a word of its coordinator an engine ends itself, in seconds. A coordinator that was killed is
back in some ten seconds."""
MAX_RESTARTS = 10
"""How often Ray starts an engine again. It does not count nodes that were taken away with notice."""
CHECK_S = 1.0
"""Seconds between two looks whether the engines are there."""
ORPHAN_S = 60.0
"""After so long without a job and without a word of the driver the cluster ends itself, in seconds."""
FORGET_S = 120.0
"""How long engines may take to finish what they have of a job that has ended, in seconds; then they are killed."""


def engine_names(cluster: str, engines: int) -> dict[str, str]:
    """Name of an engine -> name of its actor."""
    return {f"engine {index}": f"{cluster}/engine {index}" for index in range(engines)}


class CoordinatorActor:
    """Owns the engines of a cluster.

    Args:
        name: of the cluster and of this actor.
        environment: of the engines' processes.
        kv_cache: whether each engine takes a share of its node's memory for its KV cache; False: its options say it.
    """

    def __init__(
        self,
        name: str,
        engines: int,
        min_engines: int,
        start: StartEngine,
        share: Share,
        environment: dict[str, str],
        kv_cache: bool,
    ) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
        logger.setLevel(logging.INFO)
        self._name, self._model, self._min_engines = name, start.model, min_engines
        me = ray.get_runtime_context().current_actor
        actor = ray.remote(importlib.import_module(ENGINE).EngineActor)
        options: dict[str, Any] = {
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "max_restarts": MAX_RESTARTS,
            "num_cpus": share.cpus,
            "num_gpus": share.gpus,
            "runtime_env": {"env_vars": environment},
        }
        self._lines: dict[str, Line] = {}
        for engine, actor_name in engine_names(name, engines).items():
            neighbours = share.neighbours if kv_cache else 0
            made = actor.options(name=actor_name, **options).remote(me, engine, start, neighbours, SILENT_S)
            self._lines[engine] = Line(engine, made, actor_name)
        self._run: HostedRun | None = None
        self._refused: tuple[str | None, ZOError] | None = None
        """A run that could not begin, and why."""
        self._next: tuple[str | None, str] | None = None
        """Run and directory that come next. The run is None after a restart of this actor: the directory has it."""
        self._driver_at = time.monotonic()
        self._check_at = 0.0
        self._leaving = False
        """Whether the cluster ends with its job."""
        self._error: str | None = None
        """Why this actor cannot go on."""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="coordinator", daemon=True).start()

    # --- what others call ---------------------------------------------------------------------------------------------

    def hear(self, engine: str, life: str, session: int, message: Any) -> None:
        """Take a message of an engine."""
        self._inbox.put(lambda: self._hear(engine, life, session, message))

    def here(self) -> None:
        """A driver needs the cluster."""
        self._driver_at = time.monotonic()

    def up(self) -> dict[str, Exception | bool]:
        """Engine -> whether it is up, or why it does not start."""
        self.here()
        return self._do(lambda: {n: line.error or line.facts is not None for n, line in self._lines.items()})

    def poll(self, run: str, directory: str, since: int) -> dict[str, Any]:
        """The status of a run, as `zo_status` of an engine has it. A run that is new here begins.

        Raises:
            ZOError: the job cannot begin.
            JobError: the coordinator has failed.
        """
        self.here()
        return self._do(lambda: self._poll(run, directory, since))

    def stop(self, run: str, cancel: bool) -> None:
        """Cancel a run, or let it take no further step, evaluate and succeed."""
        self._do(lambda: self._stop(run, cancel))

    def leave(self, cancel: bool) -> bool:
        """End the job as `stop` does, and with it the cluster, unless a driver needs it; returns whether one does."""
        return self._do(lambda: self._leave(cancel))

    def status(self) -> dict[str, Any]:
        """What `vllm-zo status` shows."""
        return self._do(self._status)

    def _do(self, what: Callable[[], Any]) -> Any:
        """What the thread answers."""
        answer: Future[Any] = Future()

        def answered() -> None:
            try:
                answer.set_result(what())
            except ZOError as error:
                answer.set_exception(error)

        self._inbox.put(answered)
        while not answer.done():
            if self._error is not None:
                raise JobError(self._error)
            with contextlib.suppress(TimeoutError):
                answer.exception(1.0)
        return answer.result()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while True:
                try:
                    self._inbox.get(timeout=self._wait_s())()
                    while not self._inbox.empty():
                        self._inbox.get()()
                except queue.Empty:
                    pass
                self._turn()
        except Exception as error:  # a bug: the driver is to hear of it, and not of one that never answers
            self._error = "".join(traceback.format_exception(error))
            logger.error("%s", self._error)
            time.sleep(ORPHAN_S)
            self._end()

    def _wait_s(self) -> float:
        wakes_at = None if self._run is None else self._run.coordinator.wakes_at()
        return max(0.0, min(self._check_at, wakes_at or self._check_at) - time.monotonic())

    def _turn(self) -> None:
        self._look()
        run = self._run
        if run is not None:
            self._send(run)
        if self._next is not None and (run is None or run.coordinator.ended):
            self._begin(*self._next)
        # An engine that has not forgotten the job may still be writing what it has published.
        idle = self._next is None and (self._run is None or self._run.coordinator.ended)
        if idle and (self._leaving or time.monotonic() - self._driver_at > ORPHAN_S):
            self._end()

    def _look(self) -> None:
        """Find out who is there."""
        for line in self._lines.values():
            if line.broken():
                self._lost(line)
                if line.life is not None:  # another process is there already
                    line.hello()
        if time.monotonic() < self._check_at:
            return
        self._check_at = time.monotonic() + CHECK_S
        for line in self._lines.values():
            line.check()
        run = self._run
        if run is not None and run.hangs(FORGET_S):
            for name in run.coordinator.engines:
                logger.error("%s does not forget its job, and is started again", name)
                ray.kill(self._lines[name].actor, no_restart=False)

    def _lost(self, line: Line) -> None:
        why = f"{line.name} has died{f': {line.error}' if line.error else ''}"
        if self._run is not None and line.name in self._run.coordinator.engines:
            logger.warning("%s; %s", why, "it is given up" if line.gone else "it is started again, and others go on")
            self._run.coordinator.leave(line.name)
        left = sum(not other.gone for other in self._lines.values())
        if self._run is not None and left < self._min_engines:
            few = f"{left} engines are left of {self._min_engines} (min_engines)" if left else "no engine is left"
            self._run.coordinator.fail(f"{few}; {self._obituary()}")

    def _obituary(self) -> str:
        said = (f"{line.name}: {line.error}" for line in self._lines.values() if line.error is not None)
        return next(said, "each has died too often")

    def _hear(self, name: str, life: str, session: int, message: Any) -> None:
        line = self._lines[name]
        if isinstance(message, Crashed):
            line.error = message.error
        elif session != line.session:
            if life != line.life:  # it has been started again
                self._lost(line)
                line.life = life
                line.hello()
        elif isinstance(message, Here):
            self._on_here(line, message)
        elif self._run is not None:
            if isinstance(message, Stopped) and "[Errno" in (message.error or ""):
                message = replace(message, error=f"{message.error}; {SHARED}")
            self._run.coordinator.receive(name, message)

    def _on_here(self, line: Line, here: Here) -> None:
        if line.facts is not None:
            return
        line.facts, line.error = here.facts, None
        if self._run is not None:
            self._run.coordinator.leave(line.name)
            self._run.coordinator.arrive(line.name)
        elif here.job_dir is not None and self._next is None:
            self._next = None, here.job_dir  # of the coordinator that was here before

    def _send(self, run: HostedRun) -> None:
        letters = defaultdict(list)
        for name, message in run.coordinator.messages():
            if isinstance(message, Join):
                # Another node reads the log: what this one has written must have reached the file system.
                run.coordinator.job.recorder.sync()
            letters[name].append(message)
        for name, messages in letters.items():
            self._lines[name].tell(messages)
        run.note()

    # --- runs ---------------------------------------------------------------------------------------------------------

    def _poll(self, run: str, directory: str, since: int) -> dict[str, Any]:
        if self._run is not None and self._run.run_id == run:
            return self._run.status(since)
        if self._refused is not None and self._refused[0] == run:
            raise self._refused[1]
        if (ended := HostedRun.ended_before(run, JobDir(Path(directory)), since)) is not None:
            return ended
        if self._run is not None:
            self._run.coordinator.stop(cancel=True)  # nobody follows it any more: a callback has raised
        self._next = run, directory
        return {"status": JobStatus.QUEUED, "records": [], "next": since}

    def _begin(self, run: str | None, directory: str) -> None:
        """Begin a run as soon as an engine is up."""
        facts = next((line.facts for line in self._lines.values() if line.facts is not None), None)
        try:
            if facts is None and all(line.gone for line in self._lines.values()):
                raise JobError(f"no engine is left; {self._obituary()}")
            if facts is None:
                return
            self._run = HostedRun(run, JobDir(Path(directory)), facts, self._min_engines)
        except ZOError as error:
            self._refused = run, error
        else:
            for line in self._lines.values():
                if line.facts is not None:
                    self._run.coordinator.arrive(line.name)
        self._next = None

    def _stop(self, run: str, cancel: bool) -> None:
        if self._run is not None and self._run.run_id == run:
            self._run.coordinator.stop(cancel=cancel)
        elif self._next is not None and self._next[0] == run:
            self._next, self._refused = None, (run, JobError("cancelled before its first step"))

    # --- the end ------------------------------------------------------------------------------------------------------

    def _leave(self, cancel: bool) -> bool:
        driver = time.monotonic() - self._driver_at < ORPHAN_S / 4
        runs = self._run is not None and not self._run.ended
        if self._run is not None and runs:
            self._run.coordinator.stop(cancel=cancel)
        # A driver that follows a job gets its result, and ends the cluster itself.
        self._leaving = cancel or not (driver and runs)
        return driver and runs

    def _end(self) -> None:
        """End the engines and this actor."""
        for line in self._lines.values():
            ray.kill(line.actor, no_restart=True)
        end_this_actor()

    def _status(self) -> dict[str, Any]:
        engines = {
            name: "gone" if line.gone else "up" if line.facts else "starting" for name, line in self._lines.items()
        }
        driver = time.monotonic() - self._driver_at < ORPHAN_S / 4
        status = {"cluster": self._name, "model": self._model, "engines": engines, "driver": driver}
        if self._run is not None:
            job = self._run.coordinator.job
            status |= {"job": str(job.directory.path), **job.stats()}
        return status
