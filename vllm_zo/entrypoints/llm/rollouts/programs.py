"""The user's program: a function in this process, or one behind a URL."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any, Protocol

from vllm_zo.entrypoints.llm.rollouts.opened import OpenedRollout
from vllm_zo.entrypoints.llm.rollouts.remote import RemoteProgram
from vllm_zo.objectives import Rollout


class Program(Protocol):
    async def play(self, rollout: OpenedRollout, row: dict[str, Any]) -> Any:
        """What the program returns for a rollout. Raises whatever it raises."""

    async def close(self) -> None:
        """Give its connections back."""


def program_of(objective: Rollout, server: str) -> Program:
    """The program of an objective.

    Args:
        server: address of the server that it asks, without a path.

    Raises:
        ConfigError: it cannot be imported in this process.
    """
    return LocalProgram(objective, server) if objective.url is None else RemoteProgram(objective, server)


class LocalProgram:
    """A function. A coroutine function runs in the pool's loop, and gets an `AsyncOpenAI`; another one runs in a thread
    for each rollout, and gets an `OpenAI`.

    Args:
        server: address of the server that the clients ask, without a path.

    Raises:
        ConfigError: the program cannot be imported in this process.
    """

    def __init__(self, objective: Rollout, server: str) -> None:
        from openai import AsyncOpenAI, OpenAI

        self._function = objective.function()
        self._server = server
        # No retries of the client's own: each would be a turn, with a seed of its own. Its time-out is the rollout's: a
        # connection takes longer than the client's 5 s where a thousand are opened at once.
        options: dict[str, Any] = {
            "base_url": server, "api_key": "none", "max_retries": 0, "timeout": objective.timeout_s,
        }  # fmt: skip
        # An object with a coroutine function as its `__call__` counts, too.
        self._is_async = any(inspect.iscoroutinefunction(f) for f in (self._function, type(self._function).__call__))
        self._client: Any = AsyncOpenAI(**options) if self._is_async else OpenAI(**options)

    async def play(self, rollout: OpenedRollout, row: dict[str, Any]) -> Any:
        # The copies share the connections.
        client = self._client.with_options(base_url=f"{self._server}{rollout.address}")
        if self._is_async:
            try:
                return await self._function(client, rollout.model, row)  # type: ignore[misc]
            except SystemExit as end:  # asyncio would end the loop with it
                raise RuntimeError(f"play called sys.exit({end.code!r})") from end
        return await _in_a_thread(lambda: self._function(client, rollout.model, row))

    async def close(self) -> None:
        closed = self._client.close()
        if inspect.isawaitable(closed):
            await closed


async def _in_a_thread(call: Callable[[], Any]) -> Any:
    """The result of `call`. Its thread is a daemon of its own: one that never returns takes no place from others."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: Exception | None) -> None:
        if result.cancelled():
            return
        if error is None:
            result.set_result(value)
        else:
            result.set_exception(error)

    def run() -> None:
        value: Any = None
        error: Exception | None = None
        try:
            value = call()
        except (SystemExit, StopIteration) as end:  # no future takes them
            error = RuntimeError(f"play raised {end!r}")
        except Exception as raised:
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="zo-rollout", daemon=True).start()
    return await result
