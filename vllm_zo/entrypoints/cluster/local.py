"""Engines in child processes of this one: started, heard, started again when they die, and ended."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from vllm_zo.cluster.protocol import ToEngine
from vllm_zo.engine.load_job import EngineFacts
from vllm_zo.entrypoints.cluster.messages import Call, Raised, Result, Started, StartEngine
from vllm_zo.errors import JobError

logger = logging.getLogger("vllm.zo.cluster")

MAX_RESTARTS = 3
"""How often an engine that has died is started again, in the life of the cluster."""
END_S = 20.0
"""How long an engine may take to end by itself, in seconds; vLLM takes some of them."""


class LocalEngine:
    """One engine and its process."""

    def __init__(self, name: str, start: StartEngine, environment: Mapping[str, str]) -> None:
        self.name = name
        self._start, self._environment = start, dict(environment)
        # A module that this program can import (a reward function, a method) can be imported there, too.
        self._environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.restarts = 0
        self.first_error: Exception | None = None
        """What ended its process, or kept it from starting, for the first time: later errors may follow from it."""
        self.facts: EngineFacts | None = None
        """Of the running process, once it is up."""
        self.spawn()

    def spawn(self) -> None:
        """Start the process; `hear` tells when it is up."""
        ours, theirs = Pipe()
        self.connection: Connection = ours
        self.facts = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm_zo.entrypoints.cluster.child", str(theirs.fileno())],
            env=self._environment,
            pass_fds=[theirs.fileno()],
            stdout=2,  # vLLM logs there, and standard output is for results
        )
        # Closed here, or the end of the child would not be the end of the pipe.
        theirs.close()
        self.send(self._start)

    @property
    def up(self) -> bool:
        """Whether the process runs and its engine has started."""
        return self.facts is not None and self.process.poll() is None and not self.connection.closed

    def send(self, message: StartEngine | Call | ToEngine) -> None:
        """Send a message. If the engine has died, nothing: `hear` tells."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def hear(self) -> Any:
        """The next message.

        Raises:
            EOFError: the process has ended.
        """
        try:
            message = self.connection.recv()
        except OSError as error:
            raise EOFError from error
        if isinstance(message, Started):
            self.facts = message.facts
        return message

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the engine process, between jobs.

        Raises:
            JobError: the engine has died.
            Exception: what the method raised.
        """
        self.send(Call(method, args))
        return self.answer()

    def answer(self) -> Any:
        """The answer of the call that was sent last. Raises what `call` raises."""
        try:
            while not isinstance(message := self.hear(), Result | Raised):
                pass  # of a job that has ended
        except EOFError:
            raise JobError(f"{self.name} {self.obituary()}") from None
        if isinstance(message, Raised):
            raise message.error
        return message.value

    def obituary(self) -> str:
        """How the process has ended, and why it did so for the first time, if it has said that."""
        status = self.process.wait(END_S)
        ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return ended if self.first_error is None else f"{ended}; its first error: {self.first_error}"

    def end(self) -> None:
        """Let the process end, and wait for that."""
        self.connection.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def heard(engines: Sequence[LocalEngine], timeout_s: float) -> list[LocalEngine]:
    """The engines that have said something, or have ended, after at most `timeout_s`."""
    by_connection = {engine.connection: engine for engine in engines}
    return [by_connection[ready] for ready in wait(list(by_connection), timeout_s)]  # type: ignore[index]
