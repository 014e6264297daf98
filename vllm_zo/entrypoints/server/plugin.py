"""The endpoint plugin that vLLM loads (entry point group `vllm.endpoint_plugins`, name `zo_server`)."""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from vllm_zo.checkpoint.hf_checkpoint import base_fingerprint
from vllm_zo.compat import moved
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.cluster.data_parallel import DataParallelClient
from vllm_zo.entrypoints.llm.chats import ServedChats
from vllm_zo.entrypoints.llm.client import AsyncEngineClient
from vllm_zo.entrypoints.llm.cpu_defaults import is_cpu_build
from vllm_zo.entrypoints.llm.rollouts.gate import RolloutGate
from vllm_zo.entrypoints.llm.rollouts.opened import OpenedRollouts
from vllm_zo.entrypoints.server.context import Service
from vllm_zo.entrypoints.server.end import end_in_time
from vllm_zo.entrypoints.server.http import page, routes_files, routes_graders, routes_jobs, routes_live, routes_models
from vllm_zo.entrypoints.server.http.events import EventHub
from vllm_zo.entrypoints.server.http.fold_guard import FoldGuard
from vllm_zo.entrypoints.server.http.live_gate import LiveGate
from vllm_zo.entrypoints.server.jobs.outcome import Outcome
from vllm_zo.entrypoints.server.jobs.prepare import Preparer
from vllm_zo.entrypoints.server.jobs.rollouts import ServedRollouts
from vllm_zo.entrypoints.server.jobs.runner import JobRunner
from vllm_zo.entrypoints.server.keys.gate import ProjectGate
from vllm_zo.entrypoints.server.keys.key_ring import KeyRing
from vllm_zo.entrypoints.server.keys.limits import Quotas
from vllm_zo.entrypoints.server.live.examples import GrowingJobs
from vllm_zo.entrypoints.server.live.feedback import Feedback
from vllm_zo.entrypoints.server.live.versions import LiveVersions
from vllm_zo.entrypoints.server.metrics import TrainingMetrics
from vllm_zo.entrypoints.server.models.names import ModelNames
from vllm_zo.entrypoints.server.models.vllm_models import Serving
from vllm_zo.entrypoints.server.patches import replace_routes
from vllm_zo.entrypoints.server.settings import DEFAULT_STATE_DIR, ServerSettings
from vllm_zo.entrypoints.server.state.directory import StateDir
from vllm_zo.entrypoints.server.state.files import Files
from vllm_zo.entrypoints.server.state.store import Store
from vllm_zo.errors import ConfigError
from vllm_zo.methods.plan import ModuleShape
from vllm_zo.objectives.graders.sandbox import why_open

logger = logging.getLogger("vllm.zo.server")

ROUTERS = (
    routes_files.router,
    routes_live.router,
    routes_jobs.router,
    routes_models.router,
    routes_graders.router,
    page.router,
)


ELSEWHERE = (
    "data_parallel_rank", "data_parallel_start_rank", "data_parallel_size_local", "data_parallel_address",
    "data_parallel_rpc_port", "data_parallel_hybrid_lb", "data_parallel_external_lb",
    "data_parallel_multi_port_external_lb",
)  # fmt: skip
"""Flags of data-parallel engines that another server balances, or that other machines have."""


class TrainingEndpoints:
    """vLLM calls `attach_router` when it builds the app, and after that `init_state` with the engine's client."""

    name = "zo_server"
    required_tasks = ("generate",)
    """vLLM leaves the plugin out of a server without this task: one for embeddings, or one that has no engine."""

    def __init__(self) -> None:
        self._service: Service | None = None
        self._metrics: TrainingMetrics | None = None
        self._rollouts = OpenedRollouts()
        self._cluster: DataParallelClient | None = None
        """Leads the jobs where the server has several engines."""
        self._drain_s = 0.0
        """`--shutdown-timeout`: how long vLLM lets requests end."""

    def attach_router(self, app: FastAPI) -> None:
        # Taken first: `replace_routes` must be able to tell vLLM's routes from ours.
        vllms = list(app.router.routes)
        for router in ROUTERS:
            app.include_router(router)
        replace_routes(app, vllms)
        app.add_middleware(LiveGate)
        app.add_middleware(FoldGuard)
        # Within vLLM's key check, which lets its addresses pass: they are keys themselves.
        app.add_middleware(RolloutGate, opened=self._rollouts)
        app.add_middleware(ProjectGate)
        put_outermost(app, (CORSMiddleware, ProjectGate))
        # FastAPI takes a lifespan only when it is made, and vLLM has made the app: so the router's is wrapped.
        app.router.lifespan_context = self._ending_with(app.router.lifespan_context)

    def _ending_with(self, inner: Any) -> Any:
        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
            async with inner(app) as state:
                # Here and not in `init_state`: only now has vLLM (`serve_http`) set its own handlers, which would
                # replace ours.
                end_in_time(asyncio.get_running_loop(), self._drain_s)
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
        # A release without the flag does not drain at all.
        self._drain_s = float(getattr(engine_client.vllm_config, "shutdown_timeout", 0.0))
        zo = ZOTrainingConfig.of_engine(additional)
        settings = ServerSettings.from_config(additional)
        keys = read_keys(settings, args)
        # Before anything in the directory is opened: two servers on one database would start every job twice.
        directory = StateDir(Path(zo.state_dir or DEFAULT_STATE_DIR)).acquire()
        engines = engine_client.vllm_config.parallel_config.data_parallel_size
        client: Any = AsyncEngineClient(engine_client)
        if engines > 1:
            client = self._cluster = DataParallelClient(engine_client, zo)
            self._cluster.start()
        render = served_chats(engine_client.renderer, args)
        serving = Serving(state.openai_serving_models, engine_client)
        modules = await trainable_modules(engine_client)
        rollouts = ServedRollouts(client, serving, self._rollouts, settings.rollout_base_url or own_address(args))
        state.zo = self._service = build_service(
            engine_client, client, serving, directory, settings, zo, render, rollouts, modules, keys
        )
        state.zo.serving.before_shutdown(state.zo.runner.leave_all)
        self._metrics = TrainingMetrics(client)
        self._metrics.start()
        # vLLM listens only after this returns, so no client sees a job between its old status and its new one.
        await state.zo.runner.resume_all()
        logger.info("training server: state in %s", directory.root)
        if settings.allow_python_graders:
            tell_isolation(await asyncio.to_thread(why_open))  # starts a program to see whether it can

    async def _close(self) -> None:
        if self._metrics is not None:
            self._metrics.stop()
        if self._service is not None:
            # In this order: the tasks of jobs still write to the store, and the next server may own the directory
            # only when nothing is written any more.
            await self._service.runner.stop()
            if self._cluster is not None:
                self._cluster.close()
            self._service.store.close()
            self._service.state.release()


def put_outermost(app: FastAPI, first: Sequence[type]) -> None:
    """Put these middlewares around all others, in this order.

    CORS: a browser of another origin shall read every answer, a 401 too, and vLLM puts its key check around its CORS
    middleware. The gate of projects: it answers for keys that vLLM's check does not know. vLLM adds its own after it
    has attached the plugins, so they can be reordered only when Starlette builds the stack: at the first request or
    lifespan message.
    """
    build = app.build_middleware_stack

    def build_reordered() -> ASGIApp:
        # The first of the list is the outermost. The sort is stable, so the others keep their order.
        app.user_middleware.sort(key=lambda one: first.index(one.cls) if one.cls in first else len(first))
        return build()

    app.build_middleware_stack = build_reordered  # type: ignore[method-assign]


def build_service(
    engine: Any,
    client: Any,
    serving: Serving,
    directory: StateDir,
    settings: ServerSettings,
    zo: ZOTrainingConfig,
    render: Any,
    rollouts: ServedRollouts,
    modules: Sequence[ModuleShape] = (),
    keys: KeyRing | None = None,
) -> Service:
    """Make everything behind the routes, and clean up what a killed server has left."""
    store = Store(directory.database)
    quotas = Quotas(keys, store)
    files, hub = Files(directory, store, quotas), EventHub()
    # The sweeps come before any job or request: what those write has no record yet, and would be swept away.
    names = ModelNames(directory, store, serving, client, base_fingerprint(engine.model_config.model))
    files.sweep()
    names.sweep()
    names.restore()
    engines = engine.vllm_config.parallel_config.data_parallel_size
    preparer = Preparer(engine, directory, files, settings, render, zo.slot_rank, modules, engines)
    live = LiveVersions(store, names, serving, hub)
    live.restore()
    growing = GrowingJobs(preparer, store, client)
    feedback = Feedback(store, growing, render)
    feedback.restore()

    def forget(job_id: str) -> None:
        growing.forget(job_id)
        feedback.forget(job_id)

    outcome = Outcome(client, directory, store, files, names, live)
    runner = JobRunner(preparer, outcome, hub, serving, rollouts, quotas, forget)
    return Service(
        settings, directory, store, files, hub, serving, names, runner, growing, live, feedback, rollouts, quotas, keys
    )


def read_keys(settings: ServerSettings, args: Namespace) -> KeyRing | None:
    """The keys of projects, if the server has such.

    Raises:
        ConfigError: the file cannot be read, or the operator has no key.
    """
    if settings.keys is None:
        return None
    # As vLLM reads them: an empty one is none.
    operator = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
    if not operator:
        raise ConfigError(
            "--zo-keys: give --api-key (or VLLM_API_KEY) too; it is the operator's, who sees all projects."
        )
    return KeyRing(Path(settings.keys), operator)


async def trainable_modules(engine: Any) -> list[ModuleShape]:
    """The modules that jobs can train, from the workers; none where the workers use a memory of their own (a GPU's),
    of which this process knows nothing. There the worker alone decides whether a job fits."""
    if not is_cpu_build():
        return []
    (modules, *_) = await engine.collective_rpc("zo_modules")
    return [ModuleShape(*module) for module in modules]


def own_address(args: Namespace) -> str:
    """The server's address for a program on this machine."""
    everywhere = args.host in (None, "", "0.0.0.0", "::")
    host = "127.0.0.1" if everywhere else f"[{args.host}]" if ":" in args.host else args.host
    return f"http{'s' if args.ssl_certfile else ''}://{host}:{args.port}"


def tell_isolation(why_open: str | None) -> None:
    if why_open is None:
        logger.info("Python graders of clients run isolated by bubblewrap")
    else:
        logger.warning(
            "Python graders of clients run without a sandbox (%s): one process, without network, but it can read every "
            "file and process that this server can read. Install bubblewrap.",
            why_open,
        )


def check_arguments(args: Namespace) -> None:
    """Refuse flags that would spread jobs over several processes.

    Raises:
        ConfigError: there is such a flag; the message names it.
    """
    if (count := getattr(args, "api_server_count", None) or 1) > 1:
        raise ConfigError(f"--api-server-count={count}: one server owns the jobs; set it to 1.")
    for name in ELSEWHERE:
        value = getattr(args, name, None)
        if value is not None and value is not False:  # rank 0 is a rank
            raise ConfigError(
                f"--{name.replace('_', '-')}={value}: this server starts all engines of its jobs itself, on one "
                "machine; give --data-parallel-size alone."
            )
    if (backend := getattr(args, "data_parallel_backend", None) or "mp") != "mp":
        raise ConfigError(f"--data-parallel-backend={backend}: expected mp; `vllm-zo train --ray` trains on a cluster.")


def served_chats(renderer: Any, args: Namespace) -> ServedChats:
    """The chat rendering, with the settings that vLLM's own routes take from the same arguments."""
    return ServedChats(
        renderer,
        moved.find("load_chat_template")(args.chat_template),
        args.chat_template_content_format,
        moved.find("resolve_default_chat_template_kwargs")(args),
    )
