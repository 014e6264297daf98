"""`integrations=[{"type": "wandb", ...}]` of a job."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_zo.errors import ConfigError


def check_available() -> None:
    """Refuse a job that asks for what is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("integrations: wandb is not installed on the server: pip install 'vllm-zo[wandb]' there.")


class WandbObserver:
    """Sends every metrics record of a job to its run. Blocks: in a thread."""

    def __init__(self, job: dict[str, Any], directory: Path) -> None:
        from vllm_zo.entrypoints.wandb_callback import WandbCallback

        asked = job["integrations"][0]["wandb"]
        base = Path(job["model"]).name
        tags = [*(asked.get("tags") or []), "vllm-zo", base, job["id"]]
        self._callback = WandbCallback(
            project=asked["project"], entity=asked.get("entity"), name=asked.get("name"), tags=tags, run_id=job["id"]
        )
        config = SimpleNamespace(to_json=lambda: {"method": job["method"], **job["hyperparameters"]})
        self._run: Any = SimpleNamespace(job_id=job["id"], directory=directory, model=job["model"], config=config)

    def __call__(self, record: dict[str, Any]) -> None:
        self._callback(self._run, record)

    def close(self) -> None:
        self._callback.close()


def observer_for(job: dict[str, Any], directory: Path) -> WandbObserver | None:
    return WandbObserver(job, directory) if job["integrations"] else None
