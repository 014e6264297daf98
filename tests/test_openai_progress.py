"""What the engine measures, as events and numbers of a job; and the same in Weights & Biases."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.openai_app import disk_full
from vllm_zo.entrypoints.server.http import errors
from vllm_zo.entrypoints.server.http.events import EventHub
from vllm_zo.entrypoints.server.jobs.follow import Follower
from vllm_zo.entrypoints.server.jobs.outcome import Outcome
from vllm_zo.entrypoints.server.jobs.progress import Progress, result_csv
from vllm_zo.entrypoints.server.jobs.wandb_run import WandbObserver
from vllm_zo.entrypoints.server.state.directory import StateDir
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.entrypoints.server.state.store import Store
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.records import given_back
from vllm_zo.jobs.status import JobStatus


def step(number: int, loss: float = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "step": number, "loss": loss, "accuracy": 0.75, "loss_plus": loss, "loss_minus": loss,
        "coefficients": [1.0],
        "learning_rate": 1e-3, "eps": 1e-2, "finite": math.isfinite(loss),
        "tokens": 10 * number, "seconds": 0.1 * number,
    } | more  # fmt: skip


def evaluation(number: int, loss: float) -> dict[str, Any]:
    return {"step": number, "eval_loss": loss, "eval_accuracy": 0.5, "eval_token_accuracy": 0.9}


def job(**more: Any) -> JobRecord:
    fields: dict[str, Any] = {
        "id": "ftjob-1", "created_at": 0, "model": "base", "organization_id": "vllm-zo", "training_file": "file-1",
        "hyperparameters": {"learning_rate": 1e-3}, "method": {"type": "supervised"}, "seed": 0, "request": {},
        "model_path": "base", "base": "f", "total_steps": 100, "status": JobStatus.RUNNING,
    }  # fmt: skip
    return JobRecord(**{**fields, **more})


def test_messages_are_those_that_scripts_look_for() -> None:
    progress = Progress(job())
    first, valid = progress.take([step(1, 0.69), evaluation(1, 0.5)], kv_cache_usage=0.25)
    assert first["message"] == "Step 1/100: training loss=0.69" and first["data"]["kv_cache_usage"] == 0.25
    assert valid["data"]["full_valid_loss"] == 0.5 and valid["data"]["full_valid_mean_token_accuracy"] == 0.9


def test_steps_that_are_taken_again_after_a_kill_are_told_once() -> None:
    progress = Progress(job())
    progress.take([step(1), step(2), evaluation(2, 0.5)], None)
    again = Progress(job(**progress.fields()))
    events = again.take([step(2, tokens=20), evaluation(2, 0.5), step(3, tokens=30)], None)
    assert [event["data"]["step"] for event in events] == [3] and again.step == 3
    assert again.trained_tokens == 20 + 10


def test_speed_and_finish_follow_from_the_last_steps() -> None:
    progress = Progress(job())
    assert progress.steps_per_second is None and progress.estimated_finish is None
    progress.take([step(n) for n in range(1, 11)], None)
    assert progress.steps_per_second == pytest.approx(10.0)


def test_numbers_that_json_lacks_become_null() -> None:
    progress = Progress(job())
    (event,) = progress.take([step(1, math.nan)], None)
    assert event["level"] == "warn" and event["data"]["train_loss"] is None
    progress.take([evaluation(1, math.nan)], None)
    fields = json.loads(json.dumps(progress.fields(), allow_nan=False))
    again = Progress(job(**fields))
    assert given_back(again.evaluations, 1, keeps_best=True) == 1, "one without a loss is never the best"


def test_the_result_file_has_a_row_a_step(tmp_path: Path) -> None:
    records = [evaluation(0, 0.9), step(1, 0.8), step(2, 0.7), evaluation(2, 0.6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = list(csv.reader(io.StringIO(result_csv(JobDir(tmp_path)).decode())))
    assert rows[0] == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert rows[1:] == [["0", "", "", "0.9", "0.9"], ["1", "0.8", "0.75", "", ""], ["2", "0.7", "0.75", "0.6", "0.9"]]


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_delays_what_is_told_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, store = StateDir(tmp_path), Store(tmp_path / "db")
    store.add_job(record := job(exclusive=True))
    answers = [
        {"status": "running", "error": None, "records": [step(1), step(2)], "next": 2},
        {"status": "failed", "error": "no luck", "records": [step(3)], "next": 3},
    ]
    answers = [{"published": [], "learning_rate": None, "waits_for": None, **answer} for answer in answers]
    calls: list[str] = []

    class Engine:
        async def call(self, method: str, *args: Any) -> Any:
            calls.append(method)
            return answers.pop(0) if method == "zo_status" else {"base_owner": record.id}

    write, failures = store._write_job, [0, 1, 2, 4]

    def full_at_times(*args: Any) -> Any:
        failures[:] = [n - 1 for n in failures]
        if -1 in failures:
            raise disk_full()
        return write(*args)

    monkeypatch.setattr(store, "_write_job", full_at_times)
    monkeypatch.setattr(errors, "FULL_DISK_WAIT_S", 0.01)
    (tmp_path / "jobs" / record.id).mkdir(parents=True)
    nothing: Any = None
    follower = Follower(record, Outcome(Engine(), state, store, nothing, nothing, nothing), EventHub())
    asyncio.run(follower.follow())
    assert max(failures) < 0, "every failure was met"
    told = [event["data"]["step"] for event in store.all("events") if event["type"] == "metrics"]
    found = store.job(record.id)
    assert told == [1, 2, 3] and found.status == JobStatus.FAILED and found.trained_tokens == 30
    assert found.error is not None and found.error["message"] == "no luck. It has no checkpoint yet."
    assert calls[-1] == "zo_restore_base", "what it had folded is taken out of the base"


# --- wandb ------------------------------------------------------------------------------------------------------------


def test_a_job_that_runs_and_pauses_itself_between_two_answers_of_the_engine_has_run(tmp_path: Path) -> None:
    state, store = StateDir(tmp_path), Store(tmp_path / "db")
    store.add_job(record := job(status=JobStatus.QUEUED))
    last = {"error": None, "records": [], "next": 2, "published": [], "learning_rate": None, "waits_for": None}
    paused = {**last, "status": "paused", "records": [step(1), step(2)], "paused_because": "it is too far away"}
    answers, found = [paused, {**last, "status": "cancelled"}], []

    class Engine:
        async def call(self, method: str, *args: Any) -> Any:
            found.append(store.job(record.id).status)
            return answers.pop(0)

    (tmp_path / "jobs" / record.id).mkdir(parents=True)
    nothing: Any = None
    asyncio.run(Follower(record, Outcome(Engine(), state, store, nothing, nothing, nothing), EventHub()).follow())
    assert found == [JobStatus.QUEUED, JobStatus.PAUSED]
    told = [event["message"] for event in store.all("events")]
    assert told[0] == "Fine-tuning job started" and "it is too far away" in told[1], told


def test_a_job_in_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    asked = {"project": "p", "name": "my run", "tags": ["x"], "entity": None}
    integrations = [{"type": "wandb", "wandb": asked}]
    record = job(model="/models/base", hyperparameters={"steps": 2}, integrations=integrations)
    observer = WandbObserver(record, tmp_path)
    observer(step(1))
    run = observer._callback._run
    assert (run.project, run.name, run.id) == ("p", "my run", "ftjob-1")
    assert set(run.tags) == {"x", "vllm-zo", "base", "ftjob-1"} and run.config["steps"] == 2
    observer(evaluation(1, 0.5))
    assert run.summary["train/loss"] == 0.5 and run.summary["validation/eval_loss"] == 0.5
    observer.close()
    assert list(tmp_path.glob("wandb/offline-run-*")) and wandb.run is None
