"""Our routes on a plain FastAPI app, with a state directory and no engine: for tests in which the engine does not
matter. Whatever would reach it fails the test."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.llm.rollouts.opened import OpenedRollouts
from vllm_zo.entrypoints.server.jobs.rollouts import ServedRollouts
from vllm_zo.entrypoints.server.keys.gate import ProjectGate
from vllm_zo.entrypoints.server.keys.key_ring import KeyRing
from vllm_zo.entrypoints.server.models.vllm_models import Serving
from vllm_zo.entrypoints.server.plugin import ROUTERS, build_service
from vllm_zo.entrypoints.server.settings import ServerSettings
from vllm_zo.entrypoints.server.state.directory import StateDir
from vllm_zo.methods.plan import ModuleShape

BASE = "base"
OPERATOR_KEY = "sk-operator"


def disk_full() -> sqlite3.OperationalError:
    """What SQLite says on a full disk."""
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorname = "SQLITE_FULL"
    return error


class NoEngine:
    """Only what is asked of an engine before it is used."""

    errored = False
    model_config = SimpleNamespace(
        model=BASE, max_model_len=128, get_vocab_size=lambda: 512, get_total_num_hidden_layers=lambda: 2
    )
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=16), parallel_config=SimpleNamespace(data_parallel_size=1)
    )
    output_processor = SimpleNamespace(request_states={})

    async def call(self, method: str, *args: Any) -> Any:
        raise AssertionError(f"{method} reached the engine")


@contextmanager
def app_client(root: Path, modules: Sequence[ModuleShape] = (), **settings: Any) -> Iterator[TestClient]:
    engine = NoEngine()
    keys = settings.get("keys")
    models = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name=BASE, model_path=BASE)], lora_requests={}, lora_id_counter=None
    )
    directory = StateDir(root).acquire()
    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    serving = Serving(models, engine)
    rollouts = ServedRollouts(engine, serving, OpenedRollouts(), "http://127.0.0.1")
    app.state.zo = build_service(
        engine,
        engine,
        serving,
        directory,
        ServerSettings(**settings),
        ZOTrainingConfig(),
        None,
        rollouts,
        modules,
        None if keys is None else KeyRing(Path(keys), [OPERATOR_KEY]),
    )
    app.add_middleware(ProjectGate)
    try:
        with TestClient(app) as client:
            yield client
    finally:
        app.state.zo.store.close()
        directory.release()


def upload(client: TestClient, data: bytes, name: str = "train.jsonl", purpose: str = "fine-tune") -> Any:
    return client.post("/v1/files", files={"file": (name, data)}, data={"purpose": purpose})
