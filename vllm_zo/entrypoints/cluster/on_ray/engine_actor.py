"""The actor of an engine: vLLM in it, in a thread of its own, and the calls that the coordinator and a driver make."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray

from vllm_zo.cluster.protocol import Join, Stop
from vllm_zo.entrypoints.cluster.child import EngineProcess, to_send
from vllm_zo.entrypoints.cluster.devices import is_foreign
from vllm_zo.entrypoints.cluster.messages import Call, Raised, Result, Started, StartEngine
from vllm_zo.entrypoints.cluster.on_ray.lines import Crashed, Hello, Here, end_this_actor
from vllm_zo.entrypoints.llm.cpu_defaults import free_memory, is_cpu_build, kv_cache_gib


class EngineActor:
    """One engine. Ray runs one method at a time, in the order in which a caller made the calls.

    Args:
        name: among the engines of its cluster.
        neighbours: engines that may be on this node, for a fair share of its memory; 0: the options say how much.
    """

    def __init__(self, coordinator: Any, name: str, start: StartEngine, neighbours: int, silent_s: float) -> None:
        os.dup2(2, 1)  # vLLM logs to standard output, and a driver's is for results
        self._coordinator, self._name, self._silent_s = coordinator, name, silent_s
        self._life = uuid.uuid4().hex
        self._session, self._next = 0, 0
        """The coordinator's line to this process, and the number of its next message."""
        self._started: Started | None = None
        self._job_dir: str | None = None
        """Of the job that the coordinator has given it."""
        self._calls: deque[int] = deque()
        self._answers: dict[int, Result | Raised] = {}
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._first: list[Any] = []
        """A message that `poll` has seen and `recv` has not taken."""
        self._heard_at = time.monotonic()
        _make_room(neighbours)
        threading.Thread(target=self._run, args=(start,), name="engine", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    # --- what others call ---------------------------------------------------------------------------------------------

    def tell(self, session: int, number: int, messages: Sequence[Any]) -> str:
        """Take messages of the coordinator; returns which life of the engine has taken them.

        They count if they are the next ones of their session, or begin a new one: after a lost one there is a gap, and
        the coordinator begins anew. Without messages it only says that both are here.
        """
        self._heard_at = time.monotonic()
        if session > self._session and number == 0:
            self._session, self._next = session, 0
        if session == self._session and number == self._next and messages:
            self._next += 1
            for message in messages:
                self._take(message)
        return self._life

    def call(self, number: int, call: Call) -> None:
        """Call a method of the engine, between jobs; `answer` has the result."""
        self._calls.append(number)
        self._inbox.put(call)

    def answer(self, number: int) -> Result | Raised | None:
        """The answer of a call, once; None: it has none yet."""
        return self._answers.pop(number, None)

    def _take(self, message: Any) -> None:
        if isinstance(message, Hello):
            if self._started is not None:
                self._say(Here(self._started.facts, self._job_dir))
            return
        if isinstance(message, Join):
            self._job_dir = message.job_dir
        elif isinstance(message, Stop):
            self._job_dir = None
        self._inbox.put(message)

    # --- the pipe of `EngineProcess`: it lives in a thread of its own, and so does all of vLLM ------------------------

    def poll(self, timeout: float | None) -> bool:
        if not self._first and (timeout is None or not self._inbox.empty()):
            self._first.append(self._inbox.get())
        return bool(self._first)

    def recv(self) -> Any:
        return self._first.pop()

    def send(self, message: Any) -> None:
        if isinstance(message, Started):
            self._started = message
            self._say(Here(message.facts, self._job_dir))
        elif isinstance(message, Result | Raised):
            self._answers[self._calls.popleft()] = message
        else:
            self._say(message)

    def _say(self, message: Any) -> None:
        self._coordinator.hear.remote(self._name, self._life, self._session, message)

    def _run(self, start: StartEngine) -> None:
        try:
            engine = EngineProcess(start, self)
        except Exception as error:  # of any kind: it is the caller's
            self._crash(to_send(error))
        try:
            engine.run()
        except Exception as error:
            self._crash(to_send(error))

    def _crash(self, error: Exception) -> None:
        """Tell why, and end the process; Ray starts another one."""
        traceback.print_exception(error)
        ray.wait([self._coordinator.hear.remote(self._name, self._life, self._session, Crashed(error))], timeout=5)
        os._exit(1)

    def _watch(self) -> None:
        while time.monotonic() - self._heard_at < self._silent_s:
            time.sleep(min(5.0, self._silent_s / 4))
        logging.getLogger("vllm.zo.cluster").error("%s has not heard of its coordinator for %.0f s and ends itself",
                                                   self._name, self._silent_s)  # fmt: skip
        end_this_actor()


def _make_room(neighbours: int) -> None:
    """Hide variables of a launcher around Ray, and take a share of the node's memory for the KV cache."""
    for name in [name for name in os.environ if is_foreign(name)]:
        del os.environ[name]
    if is_cpu_build() and neighbours and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, kv_cache_gib(free_memory()) // neighbours))
