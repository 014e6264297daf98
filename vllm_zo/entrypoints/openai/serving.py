"""The one place that reaches into vLLM's serving objects: which adapter a model name means, and who uses it.

vLLM lists and serves what stands in `OpenAIServingModels.lora_requests`, and offers no other way to put something there
without its runtime-updating routes, which take paths from clients. Checked on vLLM 0.32.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_zo.errors import ConfigError

CRASH_WAIT_S = 5.0
"""For the exit status of an engine process that has said it is dying."""
ORDERLY = (0, -2, -15, None)
"""Exit statuses of an engine process that was asked to end: itself, SIGINT, SIGTERM; None: it has not ended."""


class Serving:
    """Wraps `app.state.openai_serving_models` and the engine's front end; for their event loop only."""

    def __init__(self, models: Any, engine: Any) -> None:
        self._models, self._engine = models, engine

    @property
    def base_names(self) -> list[str]:
        """Names of the base model; the first is the one that answers give."""
        return [path.name for path in self._models.base_model_paths]

    @property
    def max_model_len(self) -> int:
        return int(self._engine.model_config.max_model_len)

    def names(self) -> list[str]:
        """What may stand for `model=` beside the base, adapters of others (--lora-modules) included."""
        return list(self._models.lora_requests)

    async def add(self, name: str, directory: Path) -> None:
        """Load the adapter in a PEFT directory, and answer requests for `name` with it.

        vLLM knows adapters and their cached KV by name and path: a name must always mean the same weights.

        Raises:
            ConfigError: the engine cannot load it; nothing has changed then.
        """
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, self._models.lora_id_counter.inc(1), str(directory))
        try:
            await self._engine.add_lora(request)
        except Exception as error:  # vLLM carries the engine's refusal over as a plain Exception
            if self._engine.errored:
                raise
            raise ConfigError(f"the engine cannot load the adapter {name}: {error}") from error
        self._models.lora_requests[name] = request

    def restore(self, name: str, directory: Path) -> None:
        """`add` without loading: it is loaded when it is first asked for."""
        from vllm.lora.request import LoRARequest

        self._models.lora_requests[name] = LoRARequest(name, self._models.lora_id_counter.inc(1), str(directory))

    def point(self, alias: str, name: str) -> None:
        """Let `alias` mean what `name` means from the next request on; requests in flight keep what they have."""
        self._models.lora_requests[alias] = self._models.lora_requests[name]

    def remove(self, name: str) -> Any:
        """Stop answering to `name`; returns vLLM's request for it, for `forget`, or None."""
        return self._models.lora_requests.pop(name, None)

    async def forget(self, request: Any) -> None:
        """Wait until nobody uses an adapter any more, and drop it from the engine: its files may go then."""
        while any(state.lora_name == request.lora_name for state in self._states()):
            await asyncio.sleep(0.1)
        await self._engine.remove_lora(request.lora_int_id)

    def add_base_name(self, name: str) -> None:
        """A further name of the base model, whose weights a `fold` job has changed for good."""
        from vllm.entrypoints.openai.models.protocol import BaseModelPath

        self._models.base_model_paths.append(BaseModelPath(name, self._models.base_model_paths[0].model_path))

    def remove_base_name(self, name: str) -> None:
        paths = self._models.base_model_paths
        paths[:] = [path for path in paths if path.name != name]

    @property
    def busy(self) -> bool:
        """Whether any client's request is under way."""
        return bool(self._states())

    def _states(self) -> list[Any]:
        return list(self._engine.output_processor.request_states.values())

    def before_shutdown(self, act: Callable[[], None]) -> None:
        """Call `act` when the server begins to end its engine: by then no endpoint of the server has heard of it.

        vLLM ends the engine first and the app (its lifespan) after that; what a call to the engine raises in between
        is whatever its half-closed sockets give.
        """
        shutdown = self._engine.shutdown

        def acting(*args: Any, **kwargs: Any) -> None:
            if not self._engine.errored:  # an engine that has died by itself is shut down too: its jobs have failed
                act()
            shutdown(*args, **kwargs)

        self._engine.shutdown = acting

    async def engine_crashed(self) -> bool:
        """After the engine has gone: whether it did so by itself, rather than with the server."""
        manager = self._engine.engine_core.resources.engine_manager
        processes = [] if manager is None else manager.processes
        deadline = asyncio.get_running_loop().time() + CRASH_WAIT_S
        while any(process.exitcode is None for process in processes):
            if asyncio.get_running_loop().time() > deadline:
                return True
            await asyncio.sleep(0.05)
        return any(process.exitcode not in ORDERLY for process in processes)
