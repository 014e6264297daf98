"""Sends a run's numbers to Weights & Biases."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_zo.entrypoints.llm.callbacks.report import DEFAULT_PROJECT, Report, library, settings_of

if TYPE_CHECKING:
    from vllm_zo.entrypoints.llm.handle import JobResult


class WandbCallback(Report):
    """A callback of `finetune`. wandb's own variables (WANDB_PROJECT, WANDB_MODE, ...) decide what no argument says.

    Args:
        name: name of the run in wandb; None: the job's id.
        run_id: id of the run in wandb. If a run of this id exists, it is continued.

    Raises:
        ConfigError: on creation, if wandb is not installed.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        run_id: str | None = None,
    ) -> None:
        super().__init__()
        self._wandb: Any = library("wandb")
        self._run: Any = None
        self._id = run_id or uuid.uuid4().hex[:8]
        self._project = project or os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT)
        self._entity, self._name, self._tags = entity, name, list(tags)

    def begin(self, run: JobResult) -> None:
        self._run = self._wandb.init(
            project=self._project,
            entity=self._entity,
            id=self._id,
            resume="allow",  # the job may go on after a restart of the server: its run goes on as well
            reinit="create_new",  # jobs that run together each have a run of their own
            name=self._name or run.job_id,
            tags=self._tags,
            dir=str(run.directory),
            config=settings_of(run),
        )
        # wandb drops a record whose own step counter went back. Records may come again after a restart, so the step is
        # a number of the record.
        self._run.define_metric("*", step_metric="step")

    def send(self, step: int, numbers: Mapping[str, Any]) -> None:
        self._run.log({**numbers, "step": step})

    def end(self) -> None:
        self._run.finish()
        self._run = None
