"""Sends a run's numbers to Trackio, Hugging Face's tracker."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_zo.entrypoints.llm.callbacks.report import DEFAULT_PROJECT, Report, flat, library, settings_of

if TYPE_CHECKING:
    from vllm_zo.entrypoints.llm.handle import JobResult


class TrackioCallback(Report):
    """A callback of `finetune`. To look: `trackio show`. TRACKIO_PROJECT names the project; Trackio's own variables say
    where it is kept.

    Raises:
        ConfigError: on creation, if Trackio is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._trackio: Any = library("trackio")
        self._run: Any = None

    def begin(self, run: JobResult) -> None:
        project = os.environ.get("TRACKIO_PROJECT", DEFAULT_PROJECT)
        self._run = self._trackio.init(
            project=project,
            name=run.job_id,
            config=flat(settings_of(run)),
            resume="allow",
            auto_log_cpu=False,  # its thread would take time from the engine
            auto_log_gpu=False,
        )

    def send(self, step: int, numbers: Mapping[str, Any]) -> None:
        self._run.log(dict(numbers), step=step)

    def end(self) -> None:
        self._run.finish()
        self._run = None
