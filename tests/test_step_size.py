"""`learning_rate="auto"`: what it is measured from, and that a run with it is as repeatable as any other."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from tests.engines import Engines
from tests.trajectories import LOZO, Trajectory, cut_copy, train
from vllm_zo import LoZO, Reward
from vllm_zo.methods import METHODS
from vllm_zo.methods.optimizers import OPTIMIZERS
from vllm_zo.methods.step_size import (
    AUTO,
    CALIBRATION_STEPS,
    GENERATION_WALK,
    MEASURED_WALK,
    REWARD_SHARE,
    WALK,
    StepSize,
)

STEPS = CALIBRATION_STEPS + 5


def test_a_number_is_taken_as_it_is() -> None:
    assert StepSize(LOZO, 0.5, multiplier=2.0).base == 1.0
    assert StepSize(LOZO, 0).base == 0.0


def test_a_step_is_a_share_of_the_probe_radius() -> None:
    rng = random.Random(0)
    steps = [[rng.gauss(0, 3) for _ in range(4)] for _ in range(CALIBRATION_STEPS + 3)]
    method = METHODS.build("lozo", queries=4, eps=2e-3)
    size = StepSize(method, AUTO, multiplier=3.0)
    for index, coefficients in enumerate(steps):
        assert (size.base is None) == (index < CALIBRATION_STEPS)
        size.note(coefficients)
    measured = steps[:CALIBRATION_STEPS]
    norm = math.sqrt(sum(sum(c**2 for c in step) for step in measured) / len(measured))
    assert size.base == pytest.approx(3.0 * method.optimizer.auto_share * 2e-3 * math.sqrt(4) / norm, rel=1e-12)


def test_a_step_of_a_reward_is_shorter() -> None:
    sizes = [StepSize(LOZO, AUTO), StepSize(LOZO, AUTO, rewarded=True)]
    for size in sizes:
        for _ in range(CALIBRATION_STEPS):
            size.note([2.0])
    assert sizes[0].base and sizes[1].base == pytest.approx(REWARD_SHARE * sizes[0].base) and REWARD_SHARE < 1


@pytest.mark.parametrize(
    ("options", "slope", "rewarded", "nearer"),
    [
        ({"eps": 1e-3}, 260.0, False, 2e-4),
        ({"eps": 1e-3, "queries": 4}, 260.0, False, 2e-4),
        ({"eps": 1e-3}, 2e3, False, 2e-5),
        ({"eps": 1e-3}, 60.0, False, None),
        ({"eps": 1e-3}, 260.0, True, None),
        ({"eps": 1e-3, "queries": 4, "estimator": "fzoo"}, 260.0, False, None),
    ],
)
def test_probes_that_move_the_loss_too_far_come_nearer(
    options: dict[str, Any], slope: float, rewarded: bool, nearer: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    method = METHODS.build("lozo", **options)
    size = StepSize(method, AUTO, rewarded=rewarded)
    with caplog.at_level("WARNING", "vllm.zo"):
        for _ in range(CALIBRATION_STEPS):
            assert size.radius == 1.0
            size.note([slope / method.queries] * method.queries)
    assert len(caplog.records) == (nearer is not None)
    if nearer is None:
        assert size.base and size.radius == 1.0
        return
    assert f"eps=0.001 moves the loss by {slope * 1e-3:.2g}" in caplog.text and f"with eps={nearer:g}" in caplog.text
    assert size.base is None and size.radius == pytest.approx(nearer / 1e-3)
    for _ in range(CALIBRATION_STEPS):  # where they are near, the loss may be steeper than from afar
        size.note([1.2 * slope / method.queries] * method.queries)
    assert size.base == pytest.approx(method.auto_step * nearer / (1.2 * slope / math.sqrt(method.queries)))


def test_they_come_nearer_until_they_are_near() -> None:
    size = StepSize(LoZO(eps=1e-2), AUTO)
    for slope in (100.0, 1e4, 1e5):  # the loss cannot rise above some nats, however steep it is
        for _ in range(CALIBRATION_STEPS):
            size.note([slope])
    assert size.radius == pytest.approx(4e-7 / 1e-2) and size.base is None


@pytest.mark.parametrize(
    ("method", "steps", "layers", "rows", "rewarded", "share"),
    [
        (LOZO, WALK // 30, 30, 50, False, 1.0),
        (LOZO, 4 * WALK // 30, 30, 50, False, 0.5),
        (LOZO, 4 * WALK, 1, 50, False, 0.5),
        (LOZO, 4 * WALK, 1, 50, True, REWARD_SHARE),  # short steps may be many
        (LOZO, 100 * WALK, 1, 50, True, 0.1),
        (LoZO(v="activations"), MEASURED_WALK, 1, 5000, False, 1.0),
        (LoZO(v="activations"), 4 * MEASURED_WALK, 1, 1000, False, 0.5),
        (LoZO(v="activations"), MEASURED_WALK, 1, 250, False, 0.5),
        (LoZO(u="written"), WALK, 1, 50, False, 1.0),
    ],
)
def test_a_longer_run_takes_shorter_steps_and_walks_as_far(
    method: LoZO, steps: int, layers: int, rows: int, rewarded: bool, share: float
) -> None:
    size = StepSize(method, AUTO, multiplier=3.0, rewarded=rewarded)
    size.expect(steps, layers, rows)
    for _ in range(CALIBRATION_STEPS):
        size.note([2.0])
    assert method.auto_step == 1.0 and size.base == pytest.approx(3.0 * share * method.eps / 2.0)
    given = StepSize(LOZO, 1e-3)
    given.expect(steps, layers, rows)
    assert given.base == 1e-3, "a rate that was given stays"


@pytest.mark.parametrize("together", [1, 9, 64, 400])
def test_steps_that_see_the_same_completions_share_a_walk(together: int) -> None:
    size = StepSize(LOZO, AUTO, together=together)
    for _ in range(CALIBRATION_STEPS):
        size.note([2.0])
    step = size.base * 2.0 / LOZO.eps  # in radii
    assert step <= 1.0
    if together > 9:
        assert step * math.sqrt(together) == pytest.approx(GENERATION_WALK)


def test_steps_that_say_nothing_do_not_count() -> None:
    size = StepSize(LOZO, AUTO)
    for index in range(2 * CALIBRATION_STEPS):
        assert size.base is None and size.may_be_known_after(index) == (index >= CALIBRATION_STEPS)
        size.note([2.0] if index % 2 else [0.0])
    assert size.base == pytest.approx(LOZO.optimizer.auto_share * LOZO.eps / 2.0)


@pytest.mark.parametrize("name", [name for name, optimizer in OPTIMIZERS.items() if optimizer.scale_free])
def test_a_scale_free_optimizer_needs_no_measurement(name: str) -> None:
    method = METHODS.build("lozo", optimizer=name, eps=1e-2)
    assert StepSize(method, AUTO).base == pytest.approx(1e-2 * method.optimizer.auto_share)


# --- in the engine ----------------------------------------------------------------------------------------------------

EVERY: dict[str, dict[str, Any]] = {
    "lozo": {"method": LOZO},
    "four queries, one-sided": {"method": {"name": "lozo", "queries": 4, "estimator": "one-sided", "eps": 1e-2}},
    "fzoo": {"method": {"name": "fzoo", "eps": 1e-2}},
    "eggroll": {"method": {"name": "eggroll", "eps": 1e-2}, "space": "fold"},
    "lora-fa": {"method": {"name": "lora-fa", "rank": 4, "eps": 1e-2}, "bases": None},
    "fold": {"method": LOZO, "space": "fold"},
}


def auto(llm: Any, **options: Any) -> Any:
    return train(llm, **{"learning_rate": AUTO, "lr_schedule": "constant", "steps": STEPS, **options})


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_the_first_steps_measure_and_the_others_move(engines: Engines, options: dict[str, Any]) -> None:
    llm = engines.get()
    run = auto(llm, **options)
    rates = [record["learning_rate"] for record in run.history]
    norms = [sum(c**2 for c in record["coefficients"]) for record in run.history[:CALIBRATION_STEPS]]
    method = run.config.method
    expected = method.auto_step * method.eps / math.sqrt(sum(norms) / CALIBRATION_STEPS)
    assert rates == [0.0] * CALIBRATION_STEPS + [pytest.approx(expected, rel=1e-6)] * 5
    if run.config.space == "fold":
        llm.restore_base(run)


def test_a_long_run_through_all_layers_takes_shorter_steps(engines: Engines) -> None:
    llm = engines.get()  # of two layers
    long = {"steps": 2 * WALK}
    for options, share in (
        (long, math.sqrt(1 / 4)),
        ({**long, "target_layers": "last"}, math.sqrt(1 / 2)),
        ({**long, "target_modules": "lm_head"}, math.sqrt(1 / 2)),
    ):
        run = auto(llm, callbacks=[stop_at(STEPS)], **options)
        first = run.history[:CALIBRATION_STEPS]
        norm = math.sqrt(sum(c**2 for record in first for c in record["coefficients"]) / CALIBRATION_STEPS)
        expected = share * LOZO.eps / norm
        assert run.history[CALIBRATION_STEPS]["learning_rate"] == pytest.approx(expected, rel=1e-6)


def stop_at(step: int) -> Any:
    return lambda run, record: run.stop() if record.get("step") == step else None


def test_a_resumed_run_finds_the_same_step_size(engines: Engines, tmp_path: Path) -> None:
    llm = engines.get()
    run = auto(llm)
    expected = Trajectory.of(llm, run)
    assert len({record.learning_rate for record in expected.steps}) == 2
    for step in (3, CALIBRATION_STEPS - 1, CALIBRATION_STEPS, STEPS - 1):
        resumed = auto(llm, resume_from=cut_copy(run.directory, tmp_path / f"cut-{step}", step))
        assert Trajectory.of(llm, resumed) == expected, f"resumed after {step} steps"


def test_probes_that_are_too_far_come_nearer_in_a_resumed_run_too(engines: Engines, tmp_path: Path) -> None:
    llm = engines.get()
    measuring = 3 * CALIBRATION_STEPS  # from afar, nearer, and near
    options = {"method": LoZO(eps=0.3), "steps": measuring + 5, "target_modules": "lm_head"}
    run = auto(llm, **options)
    radii = [record["eps"] for record in run.history]
    spans = [{*radii[at : at + CALIBRATION_STEPS]} for at in range(0, measuring, CALIBRATION_STEPS)]
    assert [len(span) for span in spans] == [1, 1, 1] and spans[0] == {0.3} and {*radii[measuring:]} == spans[2]
    assert max(spans[0]) > max(spans[1]) > max(spans[2]) > 0.0
    assert [record["learning_rate"] > 0.0 for record in run.history] == [False] * measuring + [True] * 5
    expected = Trajectory.of(llm, run)
    for step in (CALIBRATION_STEPS, CALIBRATION_STEPS + 3, 2 * CALIBRATION_STEPS, measuring, measuring + 2):
        resumed = auto(llm, resume_from=cut_copy(run.directory, tmp_path / f"cut-{step}", step), **options)
        assert Trajectory.of(llm, resumed) == expected, f"resumed after {step} steps"


def test_rewards_that_are_all_alike_are_measured_until_they_differ(engines: Engines) -> None:
    calls: list[int] = []

    def late(completions: list[str], **columns: Any) -> list[float]:
        """The same for everybody in the first seven steps, and each probe its own afterwards."""
        calls.append(len(completions))
        if len(calls) <= 7:
            return [1.0] * len(completions)
        return [float(index) for index, _ in enumerate(completions)]

    run = auto(engines.get(), objective=Reward("{sentence} It was", reward=late, max_tokens=2), steps=20, bases=1)
    rates = [record["learning_rate"] for record in run.history]
    assert rates[:17] == [0.0] * 17 and all(rate > 0.0 for rate in rates[17:])
