"""The wandb run of a job: `integrations=[{"type": "wandb", ...}]`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.errors import ConfigError


def check_available() -> None:
    """Refuse a job with a wandb run if the server has no wandb.

    Raises:
        ConfigError: wandb is not installed.
    """
    # Without importing it, which takes seconds.
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("integrations: wandb is not installed on the server: pip install 'vllm-zo[wandb]' there.")


class WandbObserver:
    """Sends every metrics record of a job to its run in wandb. It blocks: call it in a thread."""

    def __init__(self, job: JobRecord, directory: Path) -> None:
        from vllm_zo.entrypoints.llm.callbacks.wandb import WandbCallback

        asked = job.integrations[0]["wandb"]
        base = Path(job.model).name
        tags = [*(asked.get("tags") or []), "vllm-zo", base, job.id]
        self._callback = WandbCallback(
            project=asked["project"], entity=asked.get("entity"), name=asked.get("name"), tags=tags, run_id=job.id
        )
        config = SimpleNamespace(to_json=lambda: {"method": job.method, **job.hyperparameters})
        # The attributes of a run that the callback reads: the server has no `JobResult`.
        self._run: Any = SimpleNamespace(job_id=job.id, directory=directory, model=job.model, config=config)

    def __call__(self, record: dict[str, Any]) -> None:
        self._callback(self._run, record)

    def close(self) -> None:
        self._callback.close()


def observer_for(job: JobRecord, directory: Path) -> WandbObserver | None:
    return WandbObserver(job, directory) if job.integrations else None
