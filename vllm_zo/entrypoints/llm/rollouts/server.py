"""vLLM's own OpenAI server on this machine, for the clients of the programs that play."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import uvicorn

from vllm_zo.compat import moved
from vllm_zo.entrypoints.llm.rollouts.gate import RolloutGate
from vllm_zo.entrypoints.llm.rollouts.opened import OpenedRollouts, probe_requests
from vllm_zo.errors import ConfigError, JobError
from vllm_zo.validation import check_keys

NOT_GIVEN = ("model", "model_tag", "host", "port", "uds", "api_key", "config", "headless", "grpc")
"""Arguments of vLLM's server that `finetune` decides."""


def server_arguments(model: str, key: str, given: Mapping[str, Any]) -> Any:
    """The arguments of vLLM's server, as its command line would give them.

    Raises:
        ConfigError: `given` has an argument that there is not; the message has the nearest name.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    moved.find("make_arg_parser")(parser)
    args = parser.parse_args(["--model", model])
    check_keys("server argument of a rollout", given, sorted(vars(args).keys() - set(NOT_GIVEN)))
    ours = {"api_key": [key], "disable_log_stats": True, "disable_fastapi_docs": True, "enable_log_requests": False}
    for name, value in {**ours, **given}.items():
        setattr(args, name, value)
    try:
        moved.find("validate_parsed_serve_args")(args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"server={dict(given)!r:.200}: {error}") from error
    return args


class LocalServer:
    """Serves a front end on a free port of 127.0.0.1, in the event loop that starts it. A random key keeps other users
    of the machine out; a rollout's address needs none.

    Attributes:
        url: the server's address, without a path.

    Args:
        front_end: vLLM's `AsyncLLM`.
        arguments: of vLLM's server, by their names.

    Raises:
        ConfigError: an argument is unknown, or does not fit the others.
    """

    def __init__(self, front_end: Any, opened: OpenedRollouts, arguments: Mapping[str, Any]) -> None:
        self._key = secrets.token_urlsafe(24)
        self._args = server_arguments(front_end.model_config.model, self._key, arguments)
        self._front_end, self._opened = front_end, opened
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._models: Any = None
        self._server: Any = None
        self._serving: Any = None

    async def start(self) -> None:
        """Answer requests from now on. Raises JobError: vLLM's server does not start."""
        try:
            await self._start()
        except (Exception, SystemExit) as error:  # whatever vLLM raises for arguments that do not fit
            raise JobError(f"the server for rollouts does not start: {type(error).__name__}: {error}") from error

    async def _start(self) -> None:
        tasks = await self._front_end.get_supported_tasks()
        app = moved.find("build_app")(self._args, tasks, self._front_end.model_config)
        await moved.find("init_app_state")(self._front_end, app.state, self._args, tasks)
        self._models = app.state.openai_serving_models
        gate = RolloutGate(app, self._opened, self._key)
        config = uvicorn.Config(gate, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        # `serve` would take over the signals of a program whose main thread this is.
        self._server.capture_signals = nullcontext
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._serving.done():
                raise JobError("it ended while it started")
            await asyncio.sleep(0.01)

    def serve_probes(self, names: Iterable[tuple[str, str]]) -> None:
        """Let exactly these probes answer, from the next request on; any thread may call it.

        Args:
            names: (model, `lora_path`) of each probe.
        """
        self._models.lora_requests = probe_requests(names)

    async def stop(self) -> None:
        """End at once: requests that are under way belong to rollouts that nobody waits for."""
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving
        self._socket.close()
