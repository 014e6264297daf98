"""benchmarks/candidates.py: rules compared on what enters the LM head of a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import candidates
from benchmarks.candidates import CONTENDERS, GRID, SEEDS, Contender, Rows, Runs
from benchmarks.head_rules import Curvature, LastVisit, OneSided, Rloo, TwoSided
from tests.engines import SENTIMENT, Engines, reviews
from vllm_zo.tasks import Task

PLAIN = GRID.index((1.0, 1e-3))


def states(rows: int = 80, features: int = 6, labels: int = 3) -> dict[str, Tensor]:
    """Hidden states whose labels a head can tell, and a head that knows nothing."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(features, labels, generator=generator)
    found: dict[str, Tensor] = {"head": torch.zeros(labels, features)}
    for part in ("train", "validation", "test"):
        found[part] = torch.randn(rows, features, generator=generator) + 2.0
        found[f"{part} gold"] = (found[part] @ teacher).argmax(-1)
    return found


def test_a_state_that_has_learnt_nothing_has_the_loss_that_the_engine_measures(engines: Engines) -> None:
    rows = reviews(12, seed=1)
    task = Task("sst2", SENTIMENT, rows, rows, rows, SENTIMENT)
    found = candidates.hidden_states(str(engines.model("llama")), task, "float32")
    part = candidates.along(found, torch.eye(found["train"].shape[1], dtype=torch.float64))["test"]
    loss, accuracy = candidates.scores(part, torch.zeros(1, 1, 2, found["train"].shape[1]))
    measured = engines.get("llama").evaluate(rows, SENTIMENT)
    assert (loss.item(), accuracy.item()) == pytest.approx((measured["loss"], measured["accuracy"]), abs=1e-4)


def test_v_makes_all_directions_alike_or_leaves_them() -> None:
    x = states(rows=400)["train"]
    whole = x.double() @ candidates.measured_v(x, 4, whiten=1.0, centred=False)
    second = whole.T @ whole / len(x)
    torch.testing.assert_close(second, torch.eye(4, dtype=torch.float64) * candidates.OUTPUT**2)
    left = x.double() @ candidates.measured_v(x, 6, whiten=0.0, centred=False)
    ratio = torch.linalg.eigvalsh(left.T @ left) / torch.linalg.eigvalsh(x.double().T @ x.double())
    torch.testing.assert_close(ratio, ratio[:1].expand(6))


def scored(estimator: TwoSided, curvature: float) -> tuple[Tensor, Tensor]:
    """The estimator's coefficients times K, and the slopes, of losses that curve alike in all directions."""
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    directions = torch.randn(1, estimator.directions, 2, 5, generator=generator, dtype=torch.float64)

    def score(moved: Tensor) -> Tensor:
        losses = 2.0 + (moved * gradient).sum((-1, -2)) + curvature / 2 * moved.square().sum((-1, -2))
        return losses[..., None].expand(*losses.shape, 7)

    eps = torch.tensor([[1e-3], [1e-2]], dtype=torch.float64)
    w = estimator(score, directions[:, None] * eps[..., None, None], eps, torch.zeros(1, 7, dtype=torch.long))
    return w * estimator.directions, (directions * gradient).sum((-1, -2))[:, None].expand(1, 2, -1)


def test_an_estimator_sees_the_slope_along_each_direction() -> None:
    """To rounding in float64; a one-sided difference where nothing curves."""
    for estimator, curvature in ((TwoSided(3), 0.7), (OneSided(3), 0.0), (Curvature(), 0.7)):
        torch.testing.assert_close(*scored(estimator, curvature), rtol=1e-7, atol=1e-7)
    found, slopes = scored(Rloo(3), 0.0)
    torch.testing.assert_close(found, (slopes - slopes.mean(-1, keepdim=True)) * 3 / 2, rtol=1e-7, atol=1e-7)


def test_the_last_visit_stands_for_the_other_probe() -> None:
    estimator = LastVisit(torch.tensor([1.0, 2.0, 4.0]))
    eps, rows = torch.tensor([[0.5]]), torch.tensor([[2, 0]])
    first = estimator(lambda moved: torch.tensor([[[[5.0, 1.5]]]]), torch.zeros(1, 1, 1, 1, 1), eps, rows)
    assert first.item() == pytest.approx(((5.0 - 4.0) + (1.5 - 1.0)) / 2 / 0.5)
    again = estimator(lambda moved: torch.tensor([[[[5.0, 2.0]]]]), torch.zeros(1, 1, 1, 1, 1), eps, rows)
    assert again.item() == pytest.approx(0.5 / 2 / 0.5), "what it lost last time, not at first"


def test_the_gradient_is_that_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = Rows(torch.randn(2, 9, 5, generator=generator), torch.randn(2, 9, 3, generator=generator),
                torch.randint(0, 3, (2, 9), generator=generator))  # fmt: skip
    theta = torch.randn(2, 4, 3, 5, generator=generator, requires_grad=True)
    candidates.losses(rows, theta[:, :, None]).mean(-1).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(candidates.gradient_of(rows, theta.detach()), theta.grad)


@pytest.mark.parametrize("label", CONTENDERS)
def test_every_contender_learns(label: str) -> None:
    """In a state it has kept, at some step size: a rule with a wrong sign would keep the first one, just evaluated."""
    runs = Runs(CONTENDERS[label], states(), passes=0, steps=120)
    outcome = runs.run()
    assert outcome.loss.shape == outcome.test.shape == (SEEDS, len(GRID))
    assert outcome.loss.mean(0).min() < 0.95 * math.log(3)


def test_equal_passes_are_fewer_steps_for_those_who_score_more() -> None:
    def steps(contender: Contender) -> int:
        return Runs(contender, states(), passes=12_800).steps

    assert steps(Contender()) == 100 and steps(Contender(batch=16)) == 400
    assert steps(CONTENDERS["4 one-sided"]) == 40 and steps(CONTENDERS["last visit"]) == 200


def test_the_step_size_is_chosen_where_nothing_is_held_out() -> None:
    def line(task: str, contender: str, losses: dict[int, float]) -> dict[str, Any]:
        of = [[losses.get(place, math.inf)] * SEEDS for place in range(len(GRID))]
        return {"model": "m", "task": task, "contender": contender, "passes": 9, "steps_wanted": 0, "spent": 1.0,
                "loss": of, "test": of}  # fmt: skip

    lines = [line("sst2", "plain", {PLAIN: 0.5, 0: 0.6}), line("trec", "plain", {PLAIN: 2.0, 0: 1.0}),
             line("sst2", "muon", {PLAIN: 0.6, 0: 0.25}), line("trec", "muon", {PLAIN: 1.0, 0: 4.0})]  # fmt: skip
    table = candidates.report(lines, held_out=["trec"]).splitlines()
    assert table[2] == "| muon | 0.1 | 0.001 | 0.500 | 2.000 | 0.250, 0.250 | 4.000, 4.000 |"
    assert table[3] == "| plain | 1 | 0.001 | 1.000 | 1.000 | 0.500, 0.500 | 2.000, 2.000 |"


def test_a_second_call_goes_on_where_the_first_one_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(states(), tmp_path / "m-sst2-80-80-80.pt")
    arguments = ["--model", "m", "--tasks", "sst2", "--rows", "80", "80", "80", "--passes", "12800", "--hidden",
                 str(tmp_path), "--output", str(tmp_path / "out.jsonl"), "--contenders"]  # fmt: skip
    candidates.main([*arguments, "plain"])
    candidates.main([*arguments, "plain; muon"])
    written = [json.loads(line)["contender"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == ["plain", "muon"]
    assert "| muon |" in capsys.readouterr().out
