"""Turns the engine's records of a job into events and fields of the job object. No input or output, no engine."""

from __future__ import annotations

import csv
import io
import math
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, cast

from vllm_zo.entrypoints.server.http.schemas import event
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.records import EvaluationMetrics, Metrics, StepMetrics, is_evaluation

MAX_EVALUATIONS = 200
"""The newest evaluations of a continual job that its record keeps; all are in its metrics."""
SPEED_WINDOW = 50
"""The speed, and the estimated finish that follows from it, are measured over so many steps."""


class Progress:
    """Follows one job through one stay in the engine.

    A server that was killed continues from the seed log, which may be behind the record by half a second. The engine
    then takes those steps again, bit for bit, and this class makes no second event of them.

    Args:
        job: the job's record before this stay.
    """

    def __init__(self, job: JobRecord) -> None:
        self.total = job.total_steps
        self.step = job.step
        self.evaluations = [_measured(evaluation) for evaluation in job.evaluations]
        self.trained_tokens = job.trained_tokens or 0
        self.last: dict[str, Any] = job.last_step
        self._tokens_before = 0
        self._times: deque[tuple[int, float]] = deque(maxlen=SPEED_WINDOW)

    def take(self, records: Iterable[Metrics], kv_cache_usage: float | None) -> list[dict[str, Any]]:
        """Events of those records that are new."""
        events = [self._take(record, kv_cache_usage) for record in records]
        return [event for event in events if event is not None]

    def _take(self, record: Metrics, kv_cache_usage: float | None) -> dict[str, Any] | None:
        if is_evaluation(record):
            return self._evaluation(record)
        record = cast(StepMetrics, record)
        self._times.append((record["step"], record["seconds"]))
        # The engine counts from 0 in every stay. A step that is taken again moves this count and adds no tokens to the
        # job's, so this stands before the return.
        tokens, self._tokens_before = record["tokens"] - self._tokens_before, record["tokens"]
        if record["step"] <= self.step:
            return None
        self.step, self.last = record["step"], cast(dict[str, Any], record)
        self.trained_tokens += tokens
        data: dict[str, Any] = {
            "step": record["step"],
            "total_steps": self.total,
            "train_loss": record["loss"],
            "train_mean_token_accuracy": record["accuracy"],
            "loss_plus": record["loss_plus"],
            "loss_minus": record["loss_minus"],
            "projected_gradient": record["coefficients"],
            "eps": record["eps"],
            "learning_rate": record["learning_rate"],
            "steps_per_second": self.steps_per_second,
            "kv_cache_usage": kv_cache_usage,
        }
        if "update_norm" in record:
            data["update_norm"] = record["update_norm"]
        level = "info" if record["finite"] else "warn"
        return event(f"Step {self._place(record['step'])}: training loss={record['loss']:.4g}", level, plain(data))

    def _evaluation(self, record: EvaluationMetrics) -> dict[str, Any] | None:
        if any(known["step"] == record["step"] for known in self.evaluations):
            return None
        self.evaluations.append(record)
        loss, accuracy = record["eval_loss"], token_accuracy(record)
        data = {
            "step": record["step"],
            "total_steps": self.total,
            "valid_loss": loss,
            "valid_mean_token_accuracy": accuracy,
            "full_valid_loss": loss,
            "full_valid_mean_token_accuracy": accuracy,
            **_further(record),
        }
        return event(f"Step {self._place(record['step'])}: validation loss={loss:.4g}", data=plain(data))

    def _place(self, step: int) -> str:
        return f"{step}/{self.total}" if self.total else str(step)

    @property
    def steps_per_second(self) -> float | None:
        if len(self._times) < 2:
            return None
        (first, began), (last, ended) = self._times[0], self._times[-1]
        return (last - first) / (ended - began) if ended > began else None

    @property
    def estimated_finish(self) -> int | None:
        speed = self.steps_per_second if self.total else None  # a continual job has no end
        return int(time.time() + (self.total - self.step) / speed) if speed else None

    def fields(self) -> dict[str, Any]:
        """The fields of the job's record that training changes, as they are now."""
        return {
            "step": self.step,
            "trained_tokens": self.trained_tokens,
            "evaluations": [plain(evaluation) for evaluation in self._kept_evaluations()],
            "last_step": plain(self.last),
            "estimated_finish": self.estimated_finish,
        }

    def _kept_evaluations(self) -> list[EvaluationMetrics]:
        """All of them; of a job without end the first, which is the base's, and the newest."""
        if self.total == 0 and len(self.evaluations) > MAX_EVALUATIONS:
            del self.evaluations[1:-MAX_EVALUATIONS]
        return self.evaluations

    def evaluation(self, step: int) -> EvaluationMetrics | None:
        return next((known for known in self.evaluations if known["step"] == step), None)

    def checkpoint_metrics(self, step: int) -> dict[str, float | None]:
        """The numbers of a checkpoint that were measured at its step; None for others."""
        found = self.evaluation(step)
        loss, accuracy = (None, None) if found is None else (found["eval_loss"], token_accuracy(found))
        metrics: dict[str, Any] = {
            "step": step,
            "valid_loss": loss,
            "valid_mean_token_accuracy": accuracy,
            "full_valid_loss": loss,
            "full_valid_mean_token_accuracy": accuracy,
        }
        if self.last.get("step") == step:
            metrics["train_loss"] = self.last["loss"]
            metrics["train_mean_token_accuracy"] = self.last["accuracy"]
        return plain(metrics)


def token_accuracy(evaluation: EvaluationMetrics) -> float:
    """Share of tokens that the model predicts correctly, if the objective counts them; else share of examples."""
    metrics = cast(dict[str, float], evaluation)
    return metrics.get("eval_token_accuracy", metrics["eval_accuracy"])


def _further(evaluation: EvaluationMetrics) -> dict[str, float]:
    """The numbers of an evaluation that OpenAI's events have no name for: "eval_margin" as "valid_margin"."""
    metrics, named = cast(dict[str, float], evaluation), ("eval_loss", "eval_accuracy", "eval_token_accuracy")
    return {
        name.replace("eval_", "valid_", 1): value
        for name, value in metrics.items()
        if name.startswith("eval_") and name not in named
    }


def plain(data: Any) -> dict[str, Any]:
    """The mapping with None in place of nan and infinities, which JSON has not. Python would write them all the same,
    and a client's parser would fail."""
    return {name: _number(value) for name, value in data.items()}


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measured(evaluation: dict[str, Any]) -> EvaluationMetrics:
    """The inverse of `plain` for a loss: None becomes nan again, which `records.best` never chooses."""
    lost = evaluation["eval_loss"] is None
    return cast(EvaluationMetrics, {**evaluation, "eval_loss": math.nan} if lost else evaluation)


def result_csv(directory: JobDir) -> bytes:
    """The result file of a job, made from its metrics: one line a step."""
    rows: dict[int, list[Any]] = {}
    for record in directory.read_metrics():
        # A step or an evaluation that was taken again after a restart overwrites the first.
        row = rows.setdefault(record["step"], [record["step"], "", "", "", ""])
        if is_evaluation(record):
            row[3:] = [record["eval_loss"], token_accuracy(record)]
        else:
            taken = cast(StepMetrics, record)
            row[1:3] = [taken["loss"], taken["accuracy"]]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")  # as OpenAI writes it: scripts split at line feeds
    writer.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
    writer.writerows(rows[step] for step in sorted(rows))
    return out.getvalue().encode()
