"""What experiment trackers get of a run. Each library is the real one, where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_zo.config import JobConfig
from vllm_zo.entrypoints.llm.callbacks.report import TRACKERS, Report, report_to
from vllm_zo.errors import ConfigError
from vllm_zo.objectives import Classification

RECORDS: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 0.75, "eval_accuracy": 0.5, "seconds": 0.1},
    {"step": 1, "loss": 0.7, "coefficients": [1.0, 3.0], "loss_plus": None, "finite": True},
    {"step": 2, "loss": 0.6, "coefficients": [-1.0, 0.0], "loss_plus": 0.65, "finite": True},
    {"step": 2, "eval_loss": 0.5, "eval_accuracy": 1.0, "seconds": 0.2},
]
NUMBERS = {
    "train/loss": {1: 0.7, 2: 0.6},
    "train/coefficients": {1: 2.0, 2: -0.5},
    "train/loss_plus": {2: 0.65},
    "validation/eval_loss": {0: 0.75, 2: 0.5},
    "validation/eval_accuracy": {0: 0.5, 2: 1.0},
}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    config = JobConfig(objective=Classification("{sentence} It was", [" terrible", " great"]), steps=2)
    return SimpleNamespace(job_id="my-job", directory=tmp_path / "my-job", model="m", config=config)


def follow(callback: Report, run: Any) -> None:
    for record in RECORDS:
        callback(run, record)
    callback.close()
    callback.close()


def assert_numbers(found: Mapping[str, Mapping[int, float]]) -> None:
    for name, by_step in NUMBERS.items():
        assert found[name] == pytest.approx(by_step), name
    assert not {name for name in found if name.endswith("/step")}


def test_a_tracker_begins_with_the_first_record_and_ends_once(run: Any) -> None:
    class Mine(Report):
        calls: list[Any] = []  # noqa: RUF012  # of this one test

        def begin(self, run: Any) -> None:
            self.calls.append(run.job_id)

        def send(self, step: int, numbers: Mapping[str, Any]) -> None:
            self.calls.append((step, dict(numbers)))

        def end(self) -> None:
            self.calls.append("end")

    mine = Mine()
    mine.close()
    assert mine.calls == []
    follow(mine, run)
    assert (mine.calls[0], mine.calls[-1], mine.calls.count("end")) == ("my-job", "end", 1)
    assert mine.calls[2] == (1, {"train/loss": 0.7, "train/coefficients": 2.0, "train/finite": True})
    sent = mine.calls[1:-1]
    assert_numbers({name: {step: n[name] for step, n in sent if name in n} for _, first in sent for name in first})


def test_an_unknown_tracker_and_a_missing_library_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown report_to 'tensorbord': did you mean 'tensorboard'"):
        report_to("tensorbord")
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf"{name} is not installed: pip install 'vllm-zo\[{name}\]'"):
            report_to([name])
    assert report_to("") == report_to([]) == report_to(" , ") == []


def test_tensorboard_gets_every_number_by_step(run: Any) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (callback,) = report_to("tensorboard")
    follow(callback, run)
    events = EventAccumulator(str(run.directory / "tensorboard")).Reload()
    assert_numbers({tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]})
    (text,) = events.Tensors("config/text_summary")
    assert '"steps": 2' in text.tensor_proto.string_val[0].decode()


def test_mlflow_gets_every_number_by_step(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second run finds the experiment there
        (callback,) = report_to(["mlflow"])
        follow(callback, run)
    client = mlflow.MlflowClient()
    sent, _ = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (sent.info.run_name, sent.info.status, sent.data.params["method.rank"]) == ("my-job", "FINISHED", "2")
    assert_numbers(
        {key: {m.step: m.value for m in client.get_metric_history(sent.info.run_id, key)} for key in sent.data.metrics}
    )
    assert mlflow.active_run() is None


def test_trackio_gets_every_number_by_step(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    (callback,) = report_to(["trackio"])
    follow(callback, run)
    (sent,) = trackio.Api().runs("mine")
    assert sent.name == "my-job" and sent.config["method.rank"] == 2
    from trackio.sqlite_storage import SQLiteStorage

    points = SQLiteStorage.get_logs("mine", "my-job")
    assert_numbers({name: {p["step"]: p[name] for p in points if name in p} for name in NUMBERS})


def test_wandb_gets_every_number_by_step(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (callback,) = report_to("wandb")
    for record in RECORDS:
        callback(run, record)
    sent: Any = callback
    assert dict(sent._run.config)["steps"] == 2 and sent._run.summary["validation/eval_loss"] == 0.5
    callback.close()
    assert list(run.directory.glob("wandb/offline-run-*"))
