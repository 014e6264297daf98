"""A run in Weights & Biases: every number of `metrics.jsonl`, by step. An optional package, imported where used."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_zo.errors import ConfigError

if TYPE_CHECKING:
    from vllm_zo.entrypoints.run import JobResult

DEFAULT_PROJECT = "vllm-zo"


class WandbCallback:
    """A callback of `finetune`. What is not given comes from wandb's own variables (WANDB_PROJECT, WANDB_MODE, ...).

    Args:
        name: of the run; None: the job's id.
        run_id: a run of this id is continued.

    Raises:
        ConfigError: on creation, wandb is not installed.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        run_id: str | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("wandb is not installed: pip install 'vllm-zo[wandb]', or train without it.") from error
        self._wandb: Any = wandb
        self._run: Any = None
        self._id = run_id or uuid.uuid4().hex[:8]
        self._project = project or os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT)
        self._entity, self._name, self._tags = entity, name, list(tags)

    def __call__(self, run: JobResult, record: dict[str, Any]) -> None:
        if self._run is None:
            self._run = self._wandb.init(
                project=self._project,
                entity=self._entity,
                id=self._id,
                resume="allow",
                reinit="create_new",  # jobs that run together each have a run of their own
                name=self._name or run.job_id,
                tags=self._tags,
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
