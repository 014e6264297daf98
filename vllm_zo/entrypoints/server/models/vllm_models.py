"""The only module that reaches into vLLM's serving objects: it decides which adapter a model name means.

vLLM serves the adapters in `OpenAIServingModels.lora_requests`. Its only other way to add one is by the routes for
runtime updating, which take paths from clients. Checked on vLLM 0.32.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vllm_zo.commands import PROBE_NAME
from vllm_zo.entrypoints.llm.rollouts.opened import probe_requests
from vllm_zo.entrypoints.server import patches
from vllm_zo.entrypoints.server.keys.adapters import ProjectAdapters
from vllm_zo.errors import ConfigError

CRASH_WAIT_S = 5.0
"""How long to wait for the exit status of an engine process that has announced its end."""
ON_ITS_WAY_S = 2.0
"""How long a request takes at most from the look at its model's name to vLLM's list of requests: it is tokenised. The
engine refuses one that takes longer and whose adapter is gone by then."""
ORDERLY = (0, -2, -15, None)
"""Exit statuses of an engine process that was asked to end: of itself, by SIGINT, by SIGTERM. None: it still runs."""


class Serving:
    """Wraps `app.state.openai_serving_models` and the engine's front end. Only their event loop may change anything;
    `names` and `base_names` may be read in any thread."""

    def __init__(self, models: Any, engine: Any) -> None:
        self._models, self._engine = models, engine
        self._owners: dict[str, str] = {}
        models.lora_requests = ProjectAdapters(models.lora_requests, self._owners)

    def owner(self, name: str) -> str | None:
        """The project of an adapter or a probe; None for the operator's `--lora-modules` and what is not served."""
        return self._owners.get(name)

    @property
    def base_names(self) -> list[str]:
        """Names of the base model. vLLM's answers give the first."""
        return [path.name for path in self._models.base_model_paths]

    @property
    def max_model_len(self) -> int:
        return int(self._engine.model_config.max_model_len)

    def names(self) -> list[str]:
        """The names that a request may use beside those of the base, adapters of --lora-modules included."""
        # A copy in one step: `/v1/models` reads it in a thread, while the event loop may change the dictionary.
        return [name for name in self._models.lora_requests if not name.startswith(PROBE_NAME)]

    def serve_probes(self, job_id: str, probes: Iterable[tuple[str, str]], owner: str) -> None:
        """Let exactly these probes of a job answer, from the next request on.

        Args:
            probes: (model, `lora_path`) of each.
            owner: the job's project.
        """
        for name in [name for name in self._models.lora_requests if name.startswith(f"{PROBE_NAME}{job_id}/")]:
            self.remove(name)
        for name, request in probe_requests(probes).items():
            self._serve(name, request, owner)

    def _serve(self, name: str, request: Any, owner: str) -> None:
        # The owner first: a name without one is everybody's.
        self._owners[name] = owner
        self._models.lora_requests[name] = request

    async def add(self, name: str, directory: Path, owner: str) -> None:
        """Load the adapter in a PEFT directory, and answer requests for `name` with it.

        vLLM's prefix cache identifies an adapter by name and path, so a name must always mean the same weights.

        Raises:
            ConfigError: the engine cannot load it; nothing has changed then.
        """
        from vllm.lora.request import LoRARequest

        # vLLM's own counter: its routes and --lora-modules take their ids from it too.
        request = LoRARequest(name, self._models.lora_id_counter.inc(1), str(directory))
        try:
            await self._engine.add_lora(request)
        except Exception as error:  # vLLM carries the engine's refusal over as a plain Exception
            if self._engine.errored:
                raise
            raise ConfigError(f"the engine cannot load the adapter {name}: {error}") from error
        self._serve(name, request, owner)

    def restore(self, name: str, directory: Path, owner: str) -> None:
        """`add` without loading: vLLM loads the adapter at the first request for it."""
        from vllm.lora.request import LoRARequest

        self._serve(name, LoRARequest(name, self._models.lora_id_counter.inc(1), str(directory)), owner)

    def point(self, alias: str, name: str) -> None:
        """Let `alias` mean the model `name` from the next request on. Requests in flight keep their adapter."""
        self._serve(alias, self._models.lora_requests[name], self._owners[name])

    def serves(self, name: str) -> bool:
        return name in self._models.lora_requests

    def means(self, alias: str, name: str) -> bool:
        """Whether requests for `alias` are answered by the model `name`."""
        requests = self._models.lora_requests
        return alias in requests and requests[alias] is requests.get(name)

    def remove(self, name: str) -> Any:
        """Stop answering to `name`; returns vLLM's LoRARequest for it, which `forget` takes, or None."""
        request = self._models.lora_requests.pop(name, None)
        self._owners.pop(name, None)  # last, for the same reason
        return request

    async def forget(self, request: Any) -> None:
        """Wait until no request uses an adapter any more, and drop it from the engine.

        The name is gone by now, but a request that came before may still be on its way to vLLM's list of requests.
        """
        await asyncio.sleep(ON_ITS_WAY_S)
        # By name: requests that came by an alias hold the same LoRARequest.
        await self._no_request(lambda lora: lora.lora_name == request.lora_name)
        await self._engine.remove_lora(request.lora_int_id)

    async def unused(self, directory: Path) -> None:
        """Wait until no request uses the files of an adapter, under whatever name: they may go then. The engine loads
        an adapter when it starts a request for it, and ends if it cannot."""
        await self._no_request(lambda lora: lora.lora_path == str(directory))

    async def _no_request(self, uses: Callable[[Any], bool]) -> None:
        # vLLM has no event for a request's end.
        while any(state.lora_request is not None and uses(state.lora_request) for state in self._states()):
            await asyncio.sleep(0.1)

    def add_base_name(self, name: str) -> None:
        """Give the base model one more name: its weights are those that a `fold` job has trained."""
        from vllm.entrypoints.openai.models.protocol import BaseModelPath

        self._models.base_model_paths.append(BaseModelPath(name, self._models.base_model_paths[0].model_path))

    def remove_base_name(self, name: str) -> None:
        paths = self._models.base_model_paths
        paths[:] = [path for path in paths if path.name != name]  # in place: vLLM's model registry has the same list

    @property
    def busy(self) -> bool:
        """Whether any request of a client is unfinished."""
        return bool(self._states())

    def _states(self) -> list[Any]:
        return list(self._engine.output_processor.request_states.values())

    def before_shutdown(self, act: Callable[[], None]) -> None:
        """Call `act`, in any thread, when the server begins to end its engine."""
        patches.before_shutdown(self._engine, act)

    async def engine_crashed(self) -> bool:
        """After the engine has gone: whether it crashed, rather than ended with the server.

        Only the exit status tells: the errors that vLLM's client raises look alike in both cases.
        """
        manager = self._engine.engine_core.resources.engine_manager
        processes = [] if manager is None else manager.processes
        deadline = asyncio.get_running_loop().time() + CRASH_WAIT_S
        while any(process.exitcode is None for process in processes):
            if asyncio.get_running_loop().time() > deadline:
                return True
            await asyncio.sleep(0.05)
        return any(process.exitcode not in ORDERLY for process in processes)
