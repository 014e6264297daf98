"""What vLLM loads: an endpoint plugin (entry point group `vllm.endpoint_plugins`, name `zo_server`)."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.datastructures import State
from starlette.routing import BaseRoute

from vllm_zo.compat import moved
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.engine_client import AsyncEngineClient
from vllm_zo.entrypoints.openai import page, routes_files, routes_graders, routes_jobs, routes_models
from vllm_zo.entrypoints.openai.chat import chat_template
from vllm_zo.entrypoints.openai.events import EventHub
from vllm_zo.entrypoints.openai.fold_guard import FoldGuard
from vllm_zo.entrypoints.openai.metrics import TrainingMetrics
from vllm_zo.entrypoints.openai.models import ModelNames
from vllm_zo.entrypoints.openai.prepare import Preparer
from vllm_zo.entrypoints.openai.runner import JobRunner
from vllm_zo.entrypoints.openai.service import Service
from vllm_zo.entrypoints.openai.serving import Serving
from vllm_zo.entrypoints.openai.settings import DEFAULT_STATE_DIR, ServerSettings
from vllm_zo.entrypoints.openai.state_dir import StateDir
from vllm_zo.entrypoints.openai.store import Store
from vllm_zo.entrypoints.openai.uploads import Files
from vllm_zo.errors import ConfigError

logger = logging.getLogger("vllm.zo.server")

ROUTERS = (routes_files.router, routes_jobs.router, routes_models.router, routes_graders.router, page.router)


class TrainingEndpoints:
    """vLLM calls `attach_router` when it builds the app, and `init_state` when the engine is there."""

    name = "zo_server"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._service: Service | None = None
        self._metrics: TrainingMetrics | None = None

    def attach_router(self, app: FastAPI) -> None:
        vllms = list(app.router.routes)
        for router in ROUTERS:
            app.include_router(router)
        replace_routes(app, vllms)
        app.add_middleware(FoldGuard)
        app.router.lifespan_context = self._ending_with(app.router.lifespan_context)

    def _ending_with(self, inner: Any) -> Any:
        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
            async with inner(app) as state:
                try:
                    yield state
                finally:
                    await self._close()

        return lifespan

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        check_arguments(args)
        additional = engine_client.vllm_config.additional_config
        if not isinstance(additional, dict) or "zo_training" not in additional:
            raise ConfigError(
                "the training server needs an engine with training: start it with `vllm-zo serve`, or give vllm serve "
                "the flags that `vllm-zo serve MODEL --zo-print-flags` prints."
            )
        zo = ZOTrainingConfig.of_engine(additional)
        settings = ServerSettings.from_config(additional)
        directory = StateDir(Path(zo.state_dir or DEFAULT_STATE_DIR)).acquire()
        client = AsyncEngineClient(engine_client)
        render = chat_template(engine_client.get_tokenizer(), _template_of(state, args))
        state.zo = self._service = build_service(
            engine_client, client, Serving(state.openai_serving_models, engine_client), directory, settings, zo, render
        )
        state.zo.serving.before_shutdown(state.zo.runner.leave_all)
        self._metrics = TrainingMetrics(client)
        self._metrics.start()
        await state.zo.runner.resume_all()
        logger.info("training server: state in %s", directory.root)

    async def _close(self) -> None:
        if self._metrics is not None:
            self._metrics.stop()
        if self._service is not None:
            await self._service.runner.stop()
            self._service.store.close()
            self._service.state.release()


def replace_routes(app: FastAPI, earlier: Sequence[BaseRoute]) -> None:
    """Take those of the earlier routes away that a later one stands for, path and method.

    vLLM does so by itself from 0.32 on; before, its own `/v1/models` would answer, as the first of two.
    """
    routes = app.router.routes
    ours = [route for route in routes if isinstance(route, APIRoute) and route not in earlier]
    taken = {(route.path, method) for route in ours for method in route.methods}
    for route in earlier:
        if isinstance(route, APIRoute) and all((route.path, method) in taken for method in route.methods):
            routes.remove(route)


def build_service(
    engine: Any,
    client: Any,
    serving: Serving,
    directory: StateDir,
    settings: ServerSettings,
    zo: ZOTrainingConfig,
    render: Any,
) -> Service:
    """Everything behind the routes, with what a killed server has left cleaned up."""
    store = Store(directory.database)
    files, hub = Files(directory, store), EventHub()
    names = ModelNames(directory, store, serving, client)
    files.sweep()
    names.sweep()
    names.restore()
    preparer = Preparer(engine, directory, files, settings, render, zo.slot_rank)
    runner = JobRunner(client, preparer, store, names, hub, serving, zo.concurrent_jobs)
    return Service(settings, directory, store, files, hub, serving, names, runner)


def check_arguments(args: Namespace) -> None:
    """Refuse what would put jobs into several processes.

    Raises:
        ConfigError: names the flag.
    """
    if (count := getattr(args, "api_server_count", None) or 1) > 1:
        raise ConfigError(f"--api-server-count={count}: one server owns the jobs; set it to 1.")
    if (size := getattr(args, "data_parallel_size", None) or 1) > 1:
        raise ConfigError(f"--data-parallel-size={size}: data-parallel engines would train apart; set it to 1.")


def _template_of(state: State, args: Namespace) -> str | None:
    template: str | None = moved.find("load_chat_template")(args.chat_template)
    return template
