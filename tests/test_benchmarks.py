"""The programs in benchmarks/ at a size of seconds: they run, and what they print is what was measured."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import convergence, convergence_report, memory, report
from benchmarks.convergence import Data, Settings
from tests.engines import Engines, reviews

LOSS_TOLERANCE = 1e-4
"""Nats. Float32 rounding of a loss, 1e-6, over 2 eps makes a relative 1e-4 of a coefficient; a step moves the loss by
some 1e-2. Another V, sign or batch is off by 1e-2."""


def settings_for(model: Path) -> Settings:
    return Settings(
        model=str(model), data="", data_seed=0, train_rows=24, validation_rows=10, test_rows=10, steps=7,
        eval_interval=3, learning_rate=3e-3, eps=1e-2, rank=2, interval=2, bases=2, batch=4, seed=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def curves(engines: Engines) -> dict[str, Any]:
    """Both spaces by both trainers; V comes back to its first basis at step 4 in `bank`, and is new in `fold`."""
    settings = settings_for(engines.model("opt"))
    rows = Data(reviews(24, seed=1), reviews(10, seed=2), reviews(10, seed=3))
    made = {}
    for space in convergence.SPACES:
        head = {"space": space, "settings": asdict(settings)}
        made[f"{space}-ours"] = (
            head | {"trainer": "ours"} | convergence.train_ours(engines.get(), settings, space, rows)
        )
        made[f"{space}-plain"] = head | {"trainer": "plain"} | convergence.train_plain(settings, space, rows)
    return made


@pytest.mark.parametrize("space", convergence.SPACES)
def test_the_curves_of_the_engine_and_of_the_plain_trainer_coincide(curves: dict[str, Any], space: str) -> None:
    ours, plain = curves[f"{space}-ours"], curves[f"{space}-plain"]
    assert [e["step"] for e in ours["evaluations"]] == [0, 3, 6, 7]
    gaps = convergence_report.difference(ours, plain)
    assert max(gaps[key] for key in ("train_loss", "validation_loss", "test_loss")) < LOSS_TOLERANCE
    zero_shot = {name: ours["zero_shot"][name] for name in plain["zero_shot"]}
    assert zero_shot == pytest.approx(plain["zero_shot"], abs=LOSS_TOLERANCE)
    assert abs(ours["test"]["loss"] - ours["zero_shot"]["loss"]) > 10 * LOSS_TOLERANCE  # it moved


def test_the_spaces_part_when_a_basis_returns(curves: dict[str, Any]) -> None:
    bank, fold = (curves[f"{space}-plain"]["train"] for space in convergence.SPACES)
    assert bank[:4] == fold[:4]  # step 4 is the first with another V
    assert abs(bank[6][0] - fold[6][0]) > 10 * LOSS_TOLERANCE


def test_the_report_has_every_curve_and_the_picture_is_drawn(curves: dict[str, Any], tmp_path: Path) -> None:
    table = convergence_report.markdown(curves)
    assert all(row in table for row in ("| bank | ours |", "| fold | plain |", "| fold: ours, plain |"))
    assert "bank against fold" in table
    convergence_report.plot(curves, tmp_path / "images" / "curves.png")
    assert (tmp_path / "images" / "curves.png").stat().st_size > 10_000


def test_a_curve_is_taken_from_its_file_only_with_the_same_settings(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    path = tmp_path / "bank-ours.json"
    convergence.write_json(path, {"settings": asdict(settings), "train": []})
    assert convergence._load(path, settings) is not None
    assert convergence._load(path, replace(settings, seed=4)) is None


def test_without_the_data_it_says_so_and_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"SKIPPED.*train\.jsonl.*--data"):
        convergence.parse(["--data", str(tmp_path)])


def test_peak_memory_counts_what_was_freed_again_until_it_is_reset() -> None:
    memory.reset_peak()
    before = memory.peak_rss()
    block = torch.ones(320 * memory.MIB // 4)  # more than a worker of this process keeps when it is freed
    del block
    assert memory.peak_rss() - before > 250 * memory.MIB
    memory.reset_peak()
    assert memory.peak_rss() - before < 50 * memory.MIB


def peaks(start: float, work: float) -> dict[str, float]:
    return {"start": start, "ready": start, "work": work}


def test_ratios_of_peaks_are_taken_within_a_round() -> None:
    rounds = [
        {"serving": peaks(100.0, 80.0), "bank": peaks(90.0, 110.0)},
        {"serving": peaks(100.0, 200.0), "bank": peaks(90.0, 210.0)},
    ]
    summary = memory.summarise(rounds)
    assert summary["bank"]["peak"] == 160.0
    assert summary["bank"]["peak_to_serving"] == pytest.approx((1.1 + 1.05) / 2)
    assert "| bank |" in memory.markdown(summary)


def test_refresh_steps_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = memory.RefreshClock(interval=3)
    times = iter([0.0, 1.0, 2.0, 7.0, 8.0, 9.0])  # steps 1 to 6: step 4 refreshes
    monkeypatch.setattr(memory.time, "perf_counter", lambda: next(times))
    for step in range(1, 7):
        clock(None, {"step": step})
    assert clock.figures() == {"step_ms": 1000.0, "refresh_ms": 4000.0, "refresh_ms_amortised": 80.0}


def test_a_ratio_compares_the_steps_that_both_contenders_took() -> None:
    """A slow contender takes the first steps of a window only, and batches differ in their tokens."""
    tokens = [3.0, 2.0, 2.0, 1.0, 1.0]
    windows = {"ours": [10 * t for t in tokens], "slow": [40 * t for t in tokens[:3]]}
    measured = {
        name: {"windows": [{"start": 0, "ms": ms, "foreign_load": 0.0}]} for name, ms in windows.items()
    }  # fmt: skip
    found = report.summarise(measured, interval=5, reference="ours")
    assert found["slow"]["summary"]["ratio_to_ours"] == pytest.approx(4)
    assert found["slow"]["summary"]["amortised_ms"] > 4 * found["ours"]["summary"]["amortised_ms"]
