"""Callbacks that send every number of `metrics.jsonl`, by step, to an experiment tracker.

    llm.finetune(..., callbacks=report_to("tensorboard,mlflow"))            # or `vllm-zo train --report-to ...`

A tracker is a subclass of `Report` in a file of its own, which alone imports the tracker's library, and a line in
`TRACKERS`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_zo.errors import ConfigError
from vllm_zo.jobs.records import is_evaluation
from vllm_zo.validation import check_known

if TYPE_CHECKING:
    from vllm_zo.entrypoints.llm.handle import JobResult

DEFAULT_PROJECT = "vllm-zo"
HERE = "vllm_zo.entrypoints.llm.callbacks"
TRACKERS = {
    "tensorboard": "TensorBoardCallback",
    "mlflow": "MLflowCallback",
    "trackio": "TrackioCallback",
    "wandb": "WandbCallback",
}
"""Name of the tracker, and of its file here -> its class."""


class Report(ABC):
    """A callback of `finetune`. The tracker's own environment variables decide what no argument says."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, run: JobResult, record: dict[str, Any]) -> None:
        if not self._begun:
            # At the first record: a job that never starts leaves no empty run behind.
            self.begin(run)
            self._begun = True
        prefix = "validation" if is_evaluation(record) else "train"
        numbers = {f"{prefix}/{name}": value for name, value in scalars(record).items() if name != "step"}
        self.send(record["step"], numbers)

    def close(self) -> None:
        if self._begun:
            self.end()
            self._begun = False

    @abstractmethod
    def begin(self, run: JobResult) -> None:
        """Start a run in the tracker, with the job's configuration."""

    @abstractmethod
    def send(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Send the numbers of a step or an evaluation. Steps may come again after a restart."""

    @abstractmethod
    def end(self) -> None:
        """End the run in the tracker. A paused job may begin it once more."""


def report_to(trackers: str | Sequence[str]) -> list[Report]:
    """A callback for each tracker: "tensorboard,wandb", or a list of names.

    Raises:
        ConfigError: a name is unknown, or its library is not installed.
    """
    given = [trackers] if isinstance(trackers, str) else trackers
    names = list(dict.fromkeys(name.strip() for text in given for name in text.split(",") if name.strip()))
    for name in names:
        check_known("report_to", name, TRACKERS)
    return [getattr(importlib.import_module(f"{HERE}.{name}"), TRACKERS[name])() for name in names]


def library(name: str, package: str | None = None) -> ModuleType:
    """Import a tracker's library.

    Args:
        package: what pip calls it, if that is not `name`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        named = package or name
        raise ConfigError(f"{named} is not installed: pip install 'vllm-zo[{named}]', or train without it.") from error


def settings_of(run: JobResult) -> dict[str, Any]:
    """The configuration that a tracker shows."""
    return {"model": run.model, **run.config.to_json()}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings without nesting: {"method": {"rank": 2}} -> {"method.rank": 2}."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        plain |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return plain


def scalars(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as trackers draw it: the mean in place of a list (one number a direction), and without None."""
    return {
        name: sum(value) / len(value) if isinstance(value, list) and value else value
        for name, value in record.items()
        if value is not None and value != []
    }
