"""The changes that the training server makes to vLLM's server objects."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from vllm_zo.compat.registry import Patch
from vllm_zo.entrypoints.server.end import end_in_time_while_starting

SHUTDOWN = Patch(
    target="vllm.v1.engine.async_llm:AsyncLLM.shutdown",
    why="vLLM ends the engine first and the app (its lifespan) after that; what a call to the engine raises in between "
    "is whatever its half-closed sockets give, and jobs would be marked as failed",
    how="tells the job runner before the engine is shut down; only on the engine of a training server",
    upstream="none yet",
    remove_when="endpoint plugins hear of a shutdown before the engine does",
    series="none: an endpoint plugin's own business until upstream has an order of shutdown for them",
)
STARTING = Patch(
    target="vllm.entrypoints.launchers.api_server.entry:setup_server",
    why="SIGTERM while the model loads: the server waits for its engine, which notes the signal and loads on",
    how="bounds the end of the process from here on, where vLLM has just set its handler; only if the engine trains",
    upstream="none",
    remove_when="an engine that is loading ends when its front end does",
    series="none: upstream would rather end the loading engine itself",
    optional=True,
)
ROUTES = Patch(
    target="vllm.entrypoints.openai.models.api_router:show_available_models",
    why="of two routes with the same path and method the first answers: /v1/models would be vLLM's, without the models "
    "of jobs",
    how="takes away the earlier routes that one of ours stands for",
    upstream="in vLLM since 0.32",
    remove_when="vLLM 0.31 is no longer supported",
    series="none: in vLLM since 0.32",
    built_in="vllm.plugins.endpoint_plugins.interface:APIRoute",
)


def bound_the_start() -> None:
    """Let SIGTERM end the training server that this process is about to start, also while its model is loading."""
    if STARTING.unneeded():
        return
    from vllm.entrypoints.launchers.api_server import entry

    setup_server = entry.setup_server

    def set_up_server(args: Namespace, *more: Any, **kwargs: Any) -> Any:
        # The second is the flag of a vLLM with `patches/`.
        if "zo_training" in (args.additional_config or {}) or getattr(args, "zo_training", False):
            end_in_time_while_starting()
        return setup_server(args, *more, **kwargs)

    STARTING.apply(entry, "setup_server", set_up_server)


def before_shutdown(engine: Any, act: Callable[[], None]) -> None:
    """Call `act` when the server begins to end its engine: the endpoints of the server hear of that too late.

    vLLM calls `shutdown` in a thread of the event loop's pool, so `act` must be callable from any thread.
    """
    shutdown = engine.shutdown

    def acting(*args: Any, **kwargs: Any) -> None:
        if not engine.errored:  # vLLM also shuts down an engine that has died by itself: its jobs have failed
            act()
        shutdown(*args, **kwargs)

    SHUTDOWN.on(engine, "shutdown", acting)


def replace_routes(app: FastAPI, earlier: Sequence[BaseRoute]) -> None:
    """Remove each of the `earlier` routes whose path and methods another route of the app has too."""
    if ROUTES.unneeded():
        return
    routes = app.router.routes
    ours = [route for route in routes if isinstance(route, APIRoute) and route not in earlier]
    taken = {(route.path, method) for route in ours for method in route.methods}
    for route in earlier:
        if isinstance(route, APIRoute) and all((route.path, method) in taken for method in route.methods):
            routes.remove(route)
