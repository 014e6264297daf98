"""A run in Weights & Biases: every number of `metrics.jsonl`, by step. An optional package, imported where used."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any

from vllm_zo.errors import ConfigError

if TYPE_CHECKING:
    from vllm_zo.entrypoints.run import JobResult

DEFAULT_PROJECT = "vllm-zo"


class WandbCallback:
    """A callback of `finetune`. Project, entity and mode come from wandb's own variables (WANDB_PROJECT, ...).

    Raises:
        ConfigError: on creation, wandb is not installed.
    """

    def __init__(self) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("wandb is not installed: pip install 'vllm-zo[wandb]', or train without it.") from error
        self._wandb: Any = wandb
        self._run: Any = None
        self._id = uuid.uuid4().hex[:8]

    def __call__(self, run: JobResult, record: dict[str, Any]) -> None:
        if self._run is None:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT),
                id=self._id,
                resume="allow",
                name=run.job_id,
                dir=str(run.directory),
                config={"model": run.model, **run.config.to_json()},
            )
            self._run.define_metric("*", step_metric="step")
        prefix = "validation" if "eval_loss" in record else "train"
        numbers = {f"{prefix}/{name}": value for name, value in _flat(record).items() if name != "step"}
        self._run.log(numbers | {"step": record["step"]})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """Lists (one number a direction) as their mean; wandb draws scalars."""
    return {
        name: sum(value) / len(value) if isinstance(value, list) and value else value
        for name, value in record.items()
        if value is not None and value != []
    }
