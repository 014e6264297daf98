"""What the engine has measured, as events of a job and fields of its object. Pure."""

from __future__ import annotations

import csv
import io
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from vllm_zo.entrypoints.openai.wire import event

SPEED_WINDOW = 50
"""Steps over which the speed, and with it the estimated finish, is measured."""


class Progress:
    """Follows one job through one stay in the engine.

    Steps that were recorded before (a server that was killed continues from its seed log, which may be behind by half
    a second) are taken again bit for bit, and not told a second time.

    Args:
        job: the job's record; this object only reads it.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.total: int = job["total_steps"]
        self.step: int = job["step"]
        self.evaluations: list[dict[str, Any]] = list(job.get("evaluations", []))
        self.trained_tokens: int = job.get("trained_tokens") or 0
        self.last: dict[str, Any] = job.get("last_record") or {}
        self._tokens_before = 0
        self._times: deque[tuple[int, float]] = deque(maxlen=SPEED_WINDOW)

    def take(self, records: list[dict[str, Any]], kv_cache_usage: float | None) -> list[dict[str, Any]]:
        """Events of the records that are new."""
        events = [self._take(record, kv_cache_usage) for record in records]
        return [event for event in events if event is not None]

    def _take(self, record: dict[str, Any], kv_cache_usage: float | None) -> dict[str, Any] | None:
        if "eval_loss" in record:
            return self._evaluation(record)
        self._times.append((record["step"], record["seconds"]))
        tokens, self._tokens_before = record["tokens"] - self._tokens_before, record["tokens"]
        if record["step"] <= self.step:
            return None
        self.step, self.last = record["step"], record
        self.trained_tokens += tokens
        data = {
            "step": record["step"],
            "total_steps": self.total,
            "train_loss": record["loss"],
            "train_mean_token_accuracy": record["accuracy"],
            "loss_plus": record["loss_plus"],
            "loss_minus": record["loss_minus"],
            "projected_gradient": record["projected_grad"],
            "eps": record["eps"],
            "learning_rate": record["learning_rate"],
            "steps_per_second": self.steps_per_second,
            "kv_cache_usage": kv_cache_usage,
        }
        level = "info" if record["finite"] else "warn"
        return event(f"Step {record['step']}/{self.total}: training loss={record['loss']:.4g}", level, plain(data))

    def _evaluation(self, record: dict[str, Any]) -> dict[str, Any] | None:
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
        }
        return event(f"Step {record['step']}/{self.total}: validation loss={loss:.4g}", data=plain(data))

    @property
    def steps_per_second(self) -> float | None:
        if len(self._times) < 2:
            return None
        (first, began), (last, ended) = self._times[0], self._times[-1]
        return (last - first) / (ended - began) if ended > began else None

    @property
    def estimated_finish(self) -> int | None:
        speed = self.steps_per_second
        return int(time.time() + (self.total - self.step) / speed) if speed else None

    def fields(self) -> dict[str, Any]:
        """What the job's record should say now."""
        return {
            "step": self.step,
            "trained_tokens": self.trained_tokens,
            "evaluations": self.evaluations,
            "last_record": plain(self.last),
            "estimated_finish": self.estimated_finish,
        }

    def checkpoint_metrics(self, step: int) -> dict[str, float | None]:
        """Numbers of a checkpoint, as far as they were measured at its step."""
        found = next((e for e in self.evaluations if e["step"] == step), {})
        loss, accuracy = found.get("eval_loss"), token_accuracy(found)
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


def token_accuracy(evaluation: dict[str, Any]) -> float | None:
    """Share of tokens the model gets right where the objective counts them, else of examples."""
    return evaluation.get("eval_token_accuracy", evaluation.get("eval_accuracy"))


def best_step(evaluations: list[dict[str, Any]]) -> int | None:
    """Step of the lowest validation loss (ties: the earliest)."""
    finite = [e for e in evaluations if e["eval_loss"] == e["eval_loss"]]
    return min(finite, key=lambda e: (e["eval_loss"], e["step"]), default={"step": None})["step"]


def plain(data: dict[str, Any]) -> dict[str, Any]:
    """Without what JSON has no number for (nan, infinities): null instead."""
    return {name: _number(value) for name, value in data.items()}


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(one) for one in value]
    return None if (isinstance(value, float) and abs(value) in (float("inf"),)) or value != value else value


def result_csv(directory: Path) -> bytes:
    """The result file of a job, from the `metrics.jsonl` in its directory: one row a step."""
    rows: dict[int, list[Any]] = {}
    path = directory / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        record = json.loads(line)
        row = rows.setdefault(record["step"], [record["step"], "", "", "", ""])
        if "eval_loss" in record:
            row[3:] = [record["eval_loss"], token_accuracy(record)]
        else:
            row[1:3] = [record["loss"], record["accuracy"]]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
    writer.writerows(rows[step] for step in sorted(rows))
    return out.getvalue().encode()
