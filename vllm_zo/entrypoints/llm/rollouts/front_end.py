"""vLLM's asynchronous front end, on the engine core that an `LLM` has.

vLLM's OpenAI routes want an `AsyncLLM`, and an `LLM` has a synchronous client of its core. Only the thread that waits
in `finetune` may touch that client. So the front end, in the thread of the HTTP server, leaves what it wants of the
core in a queue, and `Core.turn`, in the thread of `finetune`, does it and hands the outputs back.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor

from vllm_zo.errors import ConfigError

WAIT_S = 0.005
"""How long a turn waits if there is nothing to do. It notices requests at once, outputs of a child process later."""


class Core:
    """The engine core as `AsyncLLM` calls one. `turn` belongs to the thread that owns the core's client, the rest to
    the front end's event loop.

    Args:
        client: vLLM's synchronous client of the core.
        step: steps an engine in this process, and returns whether it had work; None for one in a child process.
        tasks: what the model supports, as vLLM's client gives it.
    """

    resources = SimpleNamespace(engine_dead=False)
    """`AsyncLLM.errored` asks it. If the engine dies, `turn` raises, and the server ends with it."""

    def __init__(self, client: Any, step: Callable[[Callable[[], Any]], Any] | None, tasks: Any) -> None:
        self._client, self._step, self._tasks = client, step, tasks
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wanted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()

    # --- the front end's event loop -----------------------------------------------------------------------------------

    async def get_supported_tasks_async(self) -> Any:
        return self._tasks

    async def add_request_async(self, request: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._wanted.put(lambda: self._add(request))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self._wanted.put(lambda: self._client.abort_requests(request_ids))

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._outputs.get()

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing: the core goes on with its `LLM`."""

    # --- the thread that owns the core's client -----------------------------------------------------------------------

    def wake(self) -> None:
        """End the wait of the turn that is under way; any thread may call it."""
        self._wanted.put(lambda: None)

    def turn(self) -> bool:
        """Do what the front end wants, and fetch what the engine has written; waits a moment if there is nothing.

        Returns:
            False if an engine in this process has no work.
        """
        self._do_wanted(wait_s=0.0)
        if self._step is not None:
            outputs = self._step(self._client.get_output)
            if outputs is None:
                return False
            self._hand_back(outputs)
        elif self._client.outputs_queue.empty():
            self._do_wanted(wait_s=WAIT_S)
        else:
            self._hand_back(self._client.get_output())
        return True

    def _do_wanted(self, wait_s: float) -> None:
        try:
            self._wanted.get(timeout=wait_s)() if wait_s else self._wanted.get_nowait()()
            while True:
                self._wanted.get_nowait()()
        except queue.Empty:
            return

    def _add(self, request: Any) -> None:
        try:
            self._client.add_request(request)
        except ConfigError as error:  # of an engine in this process; one in a child answers with such an output itself
            refusal = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=str(error))
            self._hand_back(EngineCoreOutputs(outputs=[refusal]))

    def _hand_back(self, outputs: EngineCoreOutputs) -> None:
        if outputs.outputs and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, outputs)


class FrontEnd(AsyncLLM):
    """An `AsyncLLM` that starts no engine: it shares the renderer and the core of an `LLM`."""

    def __init__(self, llm_engine: Any, core: Core) -> None:
        # Not `super().__init__()`, which would start an engine. These are all attributes that it sets (vLLM 0.32), but
        # for those that belong to profiling and to engines in several processes.
        config = llm_engine.vllm_config
        self.vllm_config, self.model_config = config, config.model_config
        self.scheduler_config, self.observability_config = config.scheduler_config, config.observability_config
        self.renderer, self.input_processor = llm_engine.renderer, llm_engine.input_processor
        self.log_requests = self.log_stats = False
        self.logger_manager = self.admission_stats = self.profiler = None
        self.output_handler: asyncio.Task[None] | None = None
        # Its own: that of the LLM belongs to another thread.
        self.output_processor = OutputProcessor(
            self.renderer.tokenizer, log_stats=False, stream_interval=config.scheduler_config.stream_interval
        )
        self.engine_core = core

    def shutdown(self, timeout: float | None = None) -> None:
        """End the task that reads outputs; renderer and core go on with their `LLM`."""
        if self.output_handler is not None and not self.output_handler.done():
            self.output_handler.cancel()
