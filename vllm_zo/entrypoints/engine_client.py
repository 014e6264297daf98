"""Talking to the engine from the front end, in process or in a child process, and moving it forward while a job
runs."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from vllm_zo.errors import ConfigError

POLL_INTERVAL_S = 0.1
LIVENESS_INTERVAL_S = 1.0
"""How often a call that waits for an answer looks whether the engine process is still there."""


class EngineClient:
    """Calls EngineCore methods by name. In process the caller also has to step the engine; a child steps by itself."""

    def __init__(self, llm_engine: Any) -> None:
        self.llm_engine = llm_engine
        self._core = llm_engine.engine_core

    @property
    def in_process(self) -> bool:
        return not hasattr(self._core, "call_utility")

    def call(self, method: str, *args: Any) -> Any:
        """Call an EngineCore method by name.

        Raises:
            ConfigError: the engine refuses; its words.
            EngineDeadError: the engine process has died.
        """
        if self.in_process:
            return getattr(self._core.engine_core, method)(*args)
        with _refusals_of(method):
            return self._call_child(method, args)

    def _call_child(self, method: str, args: tuple[Any, ...]) -> Any:
        """`SyncMPClient.call_utility`, which would wait for ever for an engine that dies before it answers."""
        from vllm.v1.engine import EngineCoreRequestType

        call_id = uuid.uuid1().int >> 64
        answer: Future[Any] = Future()
        self._core.utility_results[call_id] = answer
        self._core._send_input(EngineCoreRequestType.UTILITY, (0, call_id, method, args))
        while True:
            try:
                return answer.result(timeout=LIVENESS_INTERVAL_S)
            except TimeoutError:
                self._core.ensure_alive()

    def advance(self) -> bool:
        """Let the engine work for a moment: one step in process, a short wait otherwise. False if it has no work."""
        if not self.in_process:
            time.sleep(POLL_INTERVAL_S)
            return True
        if not self._core.engine_core.scheduler.has_requests():
            return False
        with _whole_under_ctrl_c():
            self.llm_engine.step()
        return True


class AsyncEngineClient:
    """The same for an `AsyncLLM`, whose engine always is a child process; for its event loop only."""

    def __init__(self, engine: Any) -> None:
        self._core = engine.engine_core

    async def call(self, method: str, *args: Any) -> Any:
        """`EngineClient.call`, with its errors."""
        answer = asyncio.ensure_future(self._core.call_utility_async(method, *args))
        try:
            with _refusals_of(method):
                while not answer.done():
                    await asyncio.wait([answer], timeout=LIVENESS_INTERVAL_S)
                    self._core.ensure_alive()
                return answer.result()
        finally:
            answer.cancel()


@contextmanager
def _refusals_of(method: str) -> Iterator[None]:
    """vLLM carries a refusal over as a plain Exception with this text."""
    try:
        yield
    except Exception as error:
        refused = f"Call to {method} method failed: "
        if str(error).startswith(refused):
            raise ConfigError(str(error).removeprefix(refused)) from error
        raise


@contextmanager
def _whole_under_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block: a step cut off in the middle leaves groups whose results never come,
    and the job could then not be cancelled. Only the main thread hears of Ctrl-C, and only it may set a handler."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        before(*pressed[0])
