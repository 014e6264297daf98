"""Sends a run's numbers to MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_zo.entrypoints.llm.callbacks.report import DEFAULT_PROJECT, Report, flat, library, settings_of

if TYPE_CHECKING:
    from vllm_zo.entrypoints.llm.handle import JobResult

LONGEST_PARAMETER = 500
"""Characters of a parameter's value that every MLflow server keeps."""


class MLflowCallback(Report):
    """A callback of `finetune`. MLflow's variables say where to: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.

    It uses MLflow's client and no "active run", so that a run that the program itself has started stays as it is.

    Raises:
        ConfigError: on creation, if MLflow is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mlflow: Any = library("mlflow")
        self._client: Any = None
        self._id = ""

    def begin(self, run: JobResult) -> None:
        self._client = self._mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment_id, run_name=run.job_id).info.run_id
        for key, value in flat(settings_of(run)).items():
            self._client.log_param(self._id, key, str(value)[:LONGEST_PARAMETER])

    def send(self, step: int, numbers: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)
        metric = self._mlflow.entities.Metric
        self._client.log_batch(self._id, [metric(name, float(value), now, step) for name, value in numbers.items()])

    def end(self) -> None:
        self._client.set_terminated(self._id)
