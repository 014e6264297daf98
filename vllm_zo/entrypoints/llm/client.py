"""The front end's connection to the engine, which runs in this process or in a child process.

It calls the engine's methods, and moves an engine in this process forward while a job runs.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from vllm_zo.errors import ConfigError

Result = TypeVar("Result")
POLL_INTERVAL_S = 0.1
"""Seconds between two questions for new records, where the engine is a child process."""
LIVENESS_INTERVAL_S = 1.0
"""How often a call that waits for an answer looks whether the engine process is still alive, in seconds."""


class Client(Protocol):
    """What the handle of a run needs: the engine of an `LLM` has it, and so has a cluster."""

    def call(self, method: str, *args: Any) -> Any: ...

    def advance(self) -> bool: ...


class EngineClient:
    """Calls EngineCore methods by name. An engine in this process moves only in `advance`; a child moves by itself."""

    def __init__(self, llm_engine: Any) -> None:
        self.llm_engine = llm_engine
        self._core = llm_engine.engine_core

    @property
    def in_process(self) -> bool:
        # Of the two clients that an LLM may have only InprocClient lacks it: that one holds the EngineCore itself.
        return not hasattr(self._core, "call_utility")

    def call(self, method: str, *args: Any) -> Any:
        """Call an EngineCore method by name.

        Raises:
            ConfigError: the engine refuses the call; the message is the engine's.
            EngineDeadError: the engine process has died.
        """
        if self.in_process:
            return getattr(self._core.engine_core, method)(*args)
        with _refusals_of(method):
            return self._call_child(method, args)

    def _call_child(self, method: str, args: tuple[Any, ...]) -> Any:
        """Do what `SyncMPClient.call_utility` does, and also notice an engine that dies before it answers.

        vLLM's own method would wait for ever then. `utility_results`, `_send_input` and the message are vLLM's own.
        """
        from vllm.v1.engine import EngineCoreRequestType

        # 64 bits, as vLLM makes its own: msgpack carries no larger integers.
        call_id = uuid.uuid1().int >> 64
        answer: Future[Any] = Future()
        # Before sending: vLLM's output thread looks the future up when the answer comes, and fails if it is missing.
        self._core.utility_results[call_id] = answer
        # 0 is the index of this client among the front ends of the engine; with a SyncMPClient it is the only one.
        self._core._send_input(EngineCoreRequestType.UTILITY, (0, call_id, method, args))
        while True:
            try:
                return answer.result(timeout=LIVENESS_INTERVAL_S)
            except TimeoutError:
                self._core.ensure_alive()

    def advance(self) -> bool:
        """Let the engine work for a moment: one step of an engine in this process, else a short wait.

        Returns:
            False if an engine in this process has no work. A child process always counts as having some.
        """
        if not self.in_process:
            time.sleep(POLL_INTERVAL_S)
            return True
        return self._step(self.llm_engine.step) is not None

    def _step(self, step: Callable[[], Result]) -> Result | None:
        """One step of an engine in this process; None if it has no work."""
        # `LLMEngine.has_unfinished_requests` would say no: it counts requests of clients, and a job has none.
        if not self._core.engine_core.scheduler.has_requests():
            return None
        with whole_under_ctrl_c():
            return step()


class AsyncEngineClient:
    """`EngineClient` for an `AsyncLLM`, whose engine always is a child process. It belongs to that one's event loop."""

    def __init__(self, engine: Any) -> None:
        self._core = engine.engine_core

    async def call(self, method: str, *args: Any) -> Any:
        """Call an EngineCore method by name. Raises what `EngineClient.call` raises."""
        answer = asyncio.ensure_future(self._core.call_utility_async(method, *args))
        try:
            with _refusals_of(method):
                while not answer.done():
                    # Not wait_for: it would cancel the call at its first timeout.
                    await asyncio.wait([answer], timeout=LIVENESS_INTERVAL_S)
                    self._core.ensure_alive()
                return answer.result()
        finally:
            # If this caller was cancelled, the task would otherwise wait on. It has no effect on a finished task.
            answer.cancel()


@contextmanager
def _refusals_of(method: str) -> Iterator[None]:
    """Raise a refusal of the engine as ConfigError: vLLM raises it here as a plain Exception with the text below."""
    try:
        yield
    except Exception as error:
        refused = f"Call to {method} method failed: "
        if str(error).startswith(refused):
            raise ConfigError(str(error).removeprefix(refused)) from error
        raise


@contextmanager
def whole_under_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block. A step that is cut off in the middle leaves groups whose results never
    come, and the job could then not be cancelled. Only the main thread receives Ctrl-C and may set a handler."""
    before = signal.getsignal(signal.SIGINT)
    # Not callable: the signal is ignored, ends the process, or belongs to a handler in C. None of them can be called.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    # Behind the finally: an error of the block itself is raised in place of the interrupt.
    if pressed:
        before(*pressed[0])
