"""Our routes on a plain FastAPI app, with a state directory and no engine: for tests in which the engine does not
matter. Whatever would reach it fails the test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.openai.plugin import ROUTERS, build_service
from vllm_zo.entrypoints.openai.serving import Serving
from vllm_zo.entrypoints.openai.settings import ServerSettings
from vllm_zo.entrypoints.openai.state_dir import StateDir

BASE = "base"


class NoEngine:
    """Only what is asked of an engine before it is used."""

    errored = False
    model_config = SimpleNamespace(model=BASE, max_model_len=128)
    output_processor = SimpleNamespace(request_states={})

    async def call(self, method: str, *args: Any) -> Any:
        raise AssertionError(f"{method} reached the engine")


@contextmanager
def app_client(root: Path, **settings: Any) -> Iterator[TestClient]:
    engine = NoEngine()
    models = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name=BASE, model_path=BASE)], lora_requests={}, lora_id_counter=None
    )
    directory = StateDir(root).acquire()
    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    app.state.zo = build_service(
        engine, engine, Serving(models, engine), directory, ServerSettings(**settings), ZOTrainingConfig(), None
    )
    try:
        with TestClient(app) as client:
            yield client
    finally:
        app.state.zo.store.close()
        directory.release()


def upload(client: TestClient, data: bytes, name: str = "train.jsonl", purpose: str = "fine-tune") -> Any:
    return client.post("/v1/files", files={"file": (name, data)}, data={"purpose": purpose})
