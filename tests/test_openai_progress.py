"""What the engine measures, as events and numbers of a job; and the same in Weights & Biases."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from vllm_zo.entrypoints.openai import errors
from vllm_zo.entrypoints.openai.events import EventHub
from vllm_zo.entrypoints.openai.follow import Follower
from vllm_zo.entrypoints.openai.progress import Progress, best_step, result_csv
from vllm_zo.entrypoints.openai.state_dir import StateDir
from vllm_zo.entrypoints.openai.store import Store
from vllm_zo.entrypoints.openai.turns import Turns
from vllm_zo.entrypoints.openai.wandb_run import WandbObserver


def step(number: int, loss: float = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "step": number, "loss": loss, "accuracy": 0.75, "loss_plus": loss, "loss_minus": loss,
        "projected_grad": [1.0],
        "learning_rate": 1e-3, "eps": 1e-2, "finite": math.isfinite(loss),
        "tokens": 10 * number, "seconds": 0.1 * number,
    } | more  # fmt: skip


def evaluation(number: int, loss: float) -> dict[str, Any]:
    return {"step": number, "eval_loss": loss, "eval_accuracy": 0.5, "eval_token_accuracy": 0.9}


def job(**more: Any) -> dict[str, Any]:
    return {"total_steps": 100, "step": 0} | more


def test_messages_are_those_that_scripts_look_for() -> None:
    progress = Progress(job())
    first, valid = progress.take([step(1, 0.69), evaluation(1, 0.5)], kv_cache_usage=0.25)
    assert first["message"] == "Step 1/100: training loss=0.69" and first["data"]["kv_cache_usage"] == 0.25
    assert valid["data"]["full_valid_loss"] == 0.5 and valid["data"]["full_valid_mean_token_accuracy"] == 0.9


def test_steps_that_are_taken_again_after_a_kill_are_told_once() -> None:
    progress = Progress(job())
    progress.take([step(1), step(2), evaluation(2, 0.5)], None)
    again = Progress(job() | progress.fields())
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
    json.dumps(progress.fields(), allow_nan=False)


def test_the_best_evaluation_is_the_earliest_of_the_lowest() -> None:
    assert best_step([evaluation(0, 0.9), evaluation(5, 0.4), evaluation(10, 0.4)]) == 5
    assert best_step([evaluation(0, math.nan)]) is None and best_step([]) is None


def test_the_result_file_has_a_row_a_step(tmp_path: Path) -> None:
    records = [evaluation(0, 0.9), step(1, 0.8), step(2, 0.7), evaluation(2, 0.6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = list(csv.reader(io.StringIO(result_csv(tmp_path).decode())))
    assert rows[0] == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert rows[1:] == [["0", "", "", "0.9", "0.9"], ["1", "0.8", "0.75", "", ""], ["2", "0.7", "0.75", "0.6", "0.9"]]


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_delays_what_is_told_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, store = StateDir(tmp_path), Store(tmp_path / "db")
    record = job(id="ftjob-1", status="running", exclusive=True)
    store.add("jobs", record)
    answers = [
        {"status": "running", "error": None, "records": [step(1), step(2)], "next": 2},
        {"status": "failed", "error": "no luck", "records": [step(3)], "next": 3},
    ]
    answers = [{"published": [], "learning_rate": None, **answer} for answer in answers]

    class Engine:
        async def call(self, method: str, *args: Any) -> Any:
            return answers.pop(0) if method == "zo_status" else None

    update, failures = store.update, [0, 1, 2, 4]

    def full_at_times(*args: Any, **changes: Any) -> Any:
        failures[:] = [n - 1 for n in failures]
        if -1 in failures:
            raise sqlite3.OperationalError("database or disk is full")
        return update(*args, **changes)

    monkeypatch.setattr(store, "update", full_at_times)
    monkeypatch.setattr(errors, "FULL_DISK_WAIT_S", 0.01)
    (tmp_path / "jobs" / "ftjob-1").mkdir(parents=True)
    nothing: Any = None
    follower = Follower(record, Engine(), state, store, nothing, nothing, EventHub())
    assert asyncio.run(follower.follow()) == "failed" and max(failures) < 0, "every failure was met"
    told = [event["data"]["step"] for event in store.all("events") if event["type"] == "metrics"]
    assert told == [1, 2, 3] and (found := store.find("jobs", "ftjob-1")) is not None
    assert found["status"] == "failed" and found["trained_tokens"] == 30
    assert found["error"]["message"] == "no luck. It has no checkpoint yet."


# --- turns ------------------------------------------------------------------------------------------------------------


def test_jobs_run_in_the_order_of_arrival_and_some_alone() -> None:
    async def scenario() -> None:
        turns, running, order = Turns(2), set[str](), list[str]()
        gates = {name: asyncio.Event() for name in "abFcd"}

        async def run(name: str) -> None:
            async with turns.turn(name, alone=name == "F"):
                running.add(name)
                order.append(name)
                assert running == {"F"} or ("F" not in running and len(running) <= 2)
                await gates[name].wait()
                running.discard(name)

        tasks = {name: asyncio.create_task(run(name)) for name in gates}
        await asyncio.sleep(0.01)
        assert running == {"a", "b"} and turns.alone is None
        gates["a"].set()
        await asyncio.sleep(0.01)
        assert running == {"b"}, "nobody overtakes the one that must be alone"
        gates["b"].set()
        await asyncio.sleep(0.01)
        assert running == {"F"} == {turns.alone}
        tasks["c"].cancel()  # leaves the queue
        gates["F"].set()
        gates["d"].set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert order == ["a", "b", "F", "d"] and turns.idle and turns.alone is None

    asyncio.run(scenario())


# --- wandb ------------------------------------------------------------------------------------------------------------


def test_a_job_in_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    asked = {"project": "p", "name": "my run", "tags": ["x"], "entity": None}
    record = {
        "id": "ftjob-1", "model": "/models/base", "method": {"type": "supervised"}, "hyperparameters": {"steps": 2},
        "integrations": [{"type": "wandb", "wandb": asked}],
    }  # fmt: skip
    observer = WandbObserver(record, tmp_path)
    observer(step(1))
    run = observer._callback._run
    assert (run.project, run.name, run.id) == ("p", "my run", "ftjob-1")
    assert set(run.tags) == {"x", "vllm-zo", "base", "ftjob-1"} and run.config["steps"] == 2
    observer(evaluation(1, 0.5))
    assert run.summary["train/loss"] == 0.5 and run.summary["validation/eval_loss"] == 0.5
    observer.close()
    assert list(tmp_path.glob("wandb/offline-run-*")) and wandb.run is None
