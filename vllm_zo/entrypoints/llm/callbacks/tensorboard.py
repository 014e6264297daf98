"""Writes a run's numbers for TensorBoard, into the folder `tensorboard` of the job's directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_zo.entrypoints.llm.callbacks.report import Report, library, settings_of

if TYPE_CHECKING:
    from vllm_zo.entrypoints.llm.handle import JobResult

FOLDER = "tensorboard"


class TensorBoardCallback(Report):
    """A callback of `finetune`. To look: `tensorboard --logdir DIR`, with the job's directory or one above it.

    Raises:
        ConfigError: on creation, if tensorboard is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        library("tensorboard")  # first: without it, torch's error does not say what to install
        self._writer: Any = None
        self._make = library("torch.utils.tensorboard", "tensorboard").SummaryWriter

    def begin(self, run: JobResult) -> None:
        self._writer = self._make(str(run.directory / FOLDER))
        self._writer.add_text("config", f"```json\n{json.dumps(settings_of(run), indent=1)}\n```")

    def send(self, step: int, numbers: Mapping[str, Any]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, float(value), step)

    def end(self) -> None:
        self._writer.close()
        self._writer = None
