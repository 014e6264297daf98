"""A run survives whatever ends it: the resumed run is the unbroken run, bit for bit, and the log alone is the state."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.children import LONG_JOB, Child
from tests.engines import Engines, reviews, scheduler_of, worker_of
from tests.trajectories import (
    INTERVAL,
    JOB,
    SPACES,
    STEPS,
    Trajectory,
    base_weights,
    cut_copy,
    steps_of,
    train,
)
from vllm_zo import Classification, ConfigError, JobError
from vllm_zo.checkpoint import replay
from vllm_zo.checkpoint.replay import rebuild_state, replay_weights
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.checkpoint.seed_log.writer import SeedLogWriter


@pytest.fixture(scope="module", params=SPACES)
def space(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def unbroken(engines: Engines, space: str) -> tuple[Any, Trajectory]:
    """A run that nothing interrupts, with a snapshot after step 6."""
    run = train(engines.get(), space, checkpoint_interval=6)
    return run, Trajectory.of(engines.get(), run)


class Interrupt(Exception):
    pass


def interrupted(llm: Any, after: int, **options: Any) -> Any:
    """A run whose front end stopped following it after some steps; the engine holds it still."""
    runs = []

    def stop(run: Any, record: dict[str, Any]) -> None:
        if record["step"] >= after and not runs:
            runs.append(run)
            raise Interrupt

    with pytest.raises(Interrupt):
        train(llm, callbacks=[stop], **options)
    return runs[0]


# --- the same job again ----------------------------------------------------------------------------------------------


def test_the_same_job_takes_the_same_steps_on_the_same_and_on_a_fresh_engine(
    engines: Engines, space: str, unbroken: tuple[Any, Trajectory]
) -> None:
    again = train(engines.get(), space)
    assert Trajectory.of(engines.get(), again) == unbroken[1]
    fresh = engines.get(seed=1)  # vLLM's own seed has no part in it
    assert Trajectory.of(fresh, train(fresh, space)) == unbroken[1]
    other_seed = Trajectory.of(fresh, train(fresh, space, seed=6))
    assert other_seed.steps != unbroken[1].steps, "equal whatever the seed: the comparison is blind"


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_run_resumed_at_any_step_is_the_unbroken_run(
    engines: Engines, space: str, unbroken: tuple[Any, Trajectory], tmp_path: Path
) -> None:
    llm, (run, expected) = engines.get(), unbroken
    for step in (0, 1, INTERVAL, INTERVAL + 1, 2 * INTERVAL, STEPS - 1, STEPS):
        directory = cut_copy(run.directory, tmp_path / f"cut-{step}", step)
        resumed = train(llm, space, resume_from=directory)
        assert len(resumed.history) == STEPS - step
        assert Trajectory.of(llm, resumed) == expected, f"resumed after {step} steps"


def test_a_resumed_run_gives_back_a_best_state_from_before_it_was_interrupted(engines: Engines, tmp_path: Path) -> None:
    llm = engines.get()
    # With seed 2 step 2 is the best at rates of .03 to .3: rounding does not choose another.
    rate = {"learning_rate": 0.1, "seed": 2, "divergence_factor": None}
    worse = {"validation": reviews(12, seed=2), "eval_interval": 2, **rate}
    run = train(llm, **worse)
    assert 0 <= run.version < 5 < STEPS, "the best state must lie before the cut"
    directory = cut_copy(run.directory, tmp_path / "cut", 5)
    for file in run.directory.glob("step-*.safetensors"):
        shutil.copy(file, directory)
    resumed = train(llm, resume_from=directory, **worse)
    assert resumed.version == run.version and resumed.published == run.published
    assert _untimed(resumed.metrics) == _untimed(run.metrics)
    prompt, greedy = "it was", SamplingParams(temperature=0, max_tokens=4, logprobs=1)
    texts = [llm.generate(prompt, greedy, lora_request=r.lora_request)[0].outputs[0].logprobs for r in (run, resumed)]
    assert texts[0] == texts[1]


def _untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if "seconds" not in name}


@pytest.mark.parametrize("space", ["bank"], indirect=True)
@pytest.mark.parametrize("step, usable", [(STEPS - 1, True), (6, True), (5, False)])
def test_a_snapshot_saves_the_replay_and_one_ahead_of_the_log_is_ignored(
    engines: Engines,
    unbroken: tuple[Any, Trajectory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    usable: bool,
) -> None:
    run, expected = unbroken
    loaded = []
    monkeypatch.setattr(
        replay, "load_snapshot", lambda *args, load=replay.load_snapshot: loaded.append(args) or load(*args)
    )
    directory = cut_copy(run.directory, tmp_path / "cut", step, snapshot=True)
    resumed = train(engines.get(), resume_from=directory)
    assert bool(loaded) is usable
    assert Trajectory.of(engines.get(), resumed) == expected


def test_a_cancelled_run_resumes_on_its_engine_and_leaves_what_its_log_says(
    engines: Engines, space: str, unbroken: tuple[Any, Trajectory], tmp_path: Path
) -> None:
    llm = engines.get()
    original = base_weights(llm)
    run = interrupted(llm, 4, space=space)
    run.cancel()
    assert run.status == "cancelled" and not scheduler_of(llm).has_requests()
    log = read_seed_log(run.directory / "seeds.log")
    assert 4 <= log.num_steps < STEPS and log.intact
    assert log.records == unbroken[1].steps[: log.num_steps]
    if space == "bank":
        assert run.version == log.num_steps
        assert torch.equal(rebuild_state(log).acc_BN, Trajectory.of(llm, run).state["acc_BN"])
    else:
        assert_same_weights(llm, replay_weights(unfused(llm, original), log))
        with pytest.raises(ConfigError, match=f"job {run.job_id} .*restore_base"):
            train(llm, space, resume_from=run.directory)
        llm.restore_base(run)
    resumed = train(llm, space, resume_from=run.directory)
    assert Trajectory.of(llm, resumed) == unbroken[1]
    recorded = [json.loads(line)["step"] for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert recorded == list(range(1, STEPS + 1)), "a resumed run appends to its metrics, each step once"


def unfused(llm: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Packed layers' weights by Hugging Face module: OPT packs q, k and v."""
    parts = {}
    for name, weight in weights.items():
        parent, _, leaf = name.rpartition(".")
        leaves = ["q_proj", "k_proj", "v_proj"] if leaf == "qkv_proj" else [leaf]
        parts |= {f"{parent}.{leaf}": part for leaf, part in zip(leaves, weight.chunk(len(leaves)), strict=True)}
    return parts


def assert_same_weights(llm: Any, expected: dict[str, torch.Tensor]) -> None:
    actual = unfused(llm, base_weights(llm))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


def test_metrics_ahead_of_the_log_or_torn_are_cut_back_with_it(
    engines: Engines, tmp_path: Path, unbroken: tuple[Any, Trajectory], space: str
) -> None:
    directory = cut_copy(unbroken[0].directory, tmp_path / "cut", 5)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    run = train(engines.get(), space, resume_from=directory)
    Trajectory.of(engines.get(), run)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines[5:]] == [record["loss"] for record in run.history]


@pytest.mark.parametrize("space", ["bank"], indirect=True)
def test_an_evaluation_that_a_resumed_run_makes_again_stands_in_its_metrics_once(
    engines: Engines, tmp_path: Path, space: str
) -> None:
    llm, options = engines.get(), {"validation": reviews(8, seed=3), "eval_interval": 2}
    whole = train(llm, space, **options)
    expected = [json.loads(line) for line in (whole.directory / "metrics.jsonl").read_text().splitlines()]
    for steps in (0, 3, 4):  # killed in the first steps; in the middle; just after an evaluation
        directory = cut_copy(whole.directory, tmp_path / f"cut-{steps}", steps)
        train(llm, space, resume_from=directory, **options)
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert [(line["step"], "eval_loss" in line) for line in lines] == [
            (record["step"], "eval_loss" in record) for record in expected
        ], f"resumed after {steps} steps"


@pytest.mark.parametrize("space", ["bank"], indirect=True)
def test_resuming_with_other_data_or_options_is_refused_before_anything_is_touched(
    engines: Engines, unbroken: tuple[Any, Trajectory], tmp_path: Path
) -> None:
    llm = engines.get()
    directory = cut_copy(unbroken[0].directory, tmp_path / "cut", 5)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    changed = reviews(24, seed=1)
    changed[7] = {"sentence": "something else", "label": 0}
    with pytest.raises(ConfigError, match="train: row 8 is not what the run"):
        llm.finetune(changed, **JOB, **SPACES["bank"], resume_from=directory)
    with pytest.raises(ConfigError, match="row 21 .* was started with .24 rows then, 20 now"):
        llm.finetune(reviews(24, seed=1)[:20], **JOB, **SPACES["bank"], resume_from=directory)
    with pytest.raises(ConfigError, match=r"learning_rate=0.5 \(started with 0.01\)"):
        train(llm, resume_from=directory, learning_rate=0.5)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize("space", ["bank"], indirect=True)
def test_a_log_that_another_process_writes_fails_the_job_and_not_the_engine(
    engines: Engines, unbroken: tuple[Any, Trajectory], tmp_path: Path
) -> None:
    llm = engines.get()
    directory = cut_copy(unbroken[0].directory, tmp_path / "cut", 5)
    header = read_seed_log(directory / "seeds.log").header
    writer = SeedLogWriter(directory / "seeds.log", header, resume=True)
    try:
        with pytest.raises(JobError, match="is being written by a running job"):
            train(llm, resume_from=directory)
    finally:
        writer.close()
    assert Trajectory.of(llm, train(llm, resume_from=directory)) == unbroken[1]


# --- jobs that end badly ---------------------------------------------------------------------------------------------


def test_a_job_that_fails_in_the_worker_logs_what_it_applied_and_resumes(
    engines: Engines, space: str, unbroken: tuple[Any, Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engines.get()
    original = base_weights(llm)
    calls = []
    compute = Classification.loss

    def fails_once(self: Classification, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the objective has a bug")
        return compute(self, *args)

    monkeypatch.setattr(Classification, "loss", fails_once)
    runs: list[Any] = []
    with pytest.raises(JobError, match="failed: RuntimeError: the objective has a bug; its log is in"):
        train(llm, space, callbacks=[lambda run, record: runs.append(run)])
    run = runs[0]
    log = read_seed_log(run.directory / "seeds.log")
    assert log.records == unbroken[1].steps[:4], "the step that failed, and the one in flight behind it, are not logged"
    if space == "bank":
        assert torch.equal(rebuild_state(log).acc_BN, Trajectory.of(llm, run).state["acc_BN"])
    else:
        assert_same_weights(llm, replay_weights(unfused(llm, original), log))
        llm.restore_base(run)
    assert llm.generate(["the story is"], use_tqdm=False)[0].outputs[0].token_ids, "the engine goes on serving"
    assert Trajectory.of(llm, train(llm, space, resume_from=run.directory)) == unbroken[1]


@pytest.mark.parametrize("space", ["bank"], indirect=True)
def test_cancelling_in_the_middle_of_a_prefill_leaves_nothing_behind(
    engines: Engines, unbroken: tuple[Any, Trajectory]
) -> None:
    llm = engines.get(
        zo_training={"slots": 2}, max_num_batched_tokens=24, max_num_seqs=8, enable_chunked_prefill=True
    )  # the engine of test_engine_equivalence: a row takes several engine steps
    whole = Trajectory.of(llm, train(llm))
    scheduler = scheduler_of(llm)
    in_flight = []
    for engine_steps in range(8):
        run = interrupted(llm, 2)
        for _ in range(engine_steps):
            llm.llm_engine.step()
        in_flight.append(len(scheduler.running))
        run.cancel()
        assert (
            not scheduler._zo_members
            and not scheduler.requests
            and not any(lane.group for lane in scheduler.zo.queue.lanes)
        )
        assert not worker_of(llm).zo.jobs and not worker_of(llm).zo.groups
    assert any(in_flight)
    assert Trajectory.of(llm, train(llm)) == whole


@pytest.mark.parametrize("space", ["bank"], indirect=True)
def test_a_draining_engine_finishes_what_is_in_flight_and_starts_nothing_new(
    engines: Engines, unbroken: tuple[Any, Trajectory]
) -> None:
    llm = engines.get()
    scheduler = scheduler_of(llm)
    run = interrupted(llm, 3)
    scheduler.zo_draining = True
    for _ in range(4):
        llm.llm_engine.step()
    assert not scheduler.has_requests(), "async scheduling must not offer the next group while this one drains"
    scheduler.zo_draining = False
    run.wait()
    assert Trajectory.of(llm, run) == unbroken[1]


# --- the step path ---------------------------------------------------------------------------------------------------


def test_ten_steps_need_no_rpc_and_no_pause(engines: Engines, space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = engines.get().llm_engine.engine_core.engine_core
    calls: list[str] = []
    for owner, name in (
        (core.model_executor, "collective_rpc"),
        (core, "pause_scheduler"),
        (core.scheduler, "set_pause_state"),
    ):
        original = getattr(owner, name)

        def spy(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(args[0] if name == "collective_rpc" else name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)
    run = train(engines.get(), space)
    monkeypatch.undo()
    Trajectory.of(engines.get(), run)
    # UniProcExecutor sends every forward through collective_rpc; beside it nothing may be called. (Nothing is sampled:
    # members are no requests here. tests/test_seams.py looks at members that are.)
    assert len(calls) >= STEPS and set(calls) == {"execute_model"}


# --- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_unbroken(engines: Engines) -> Trajectory:
    llm = engines.get()
    return Trajectory.of(llm, train(llm, **LONG_JOB))


@pytest.mark.parametrize(
    "moment", [pytest.param("as soon as a step is logged", marks=pytest.mark.slow), "after a snapshot"]
)
def test_a_run_killed_with_signal_9_goes_on_as_if_nothing_had_happened(
    engines: Engines, long_unbroken: Trajectory, tmp_path: Path, moment: str
) -> None:
    llm, directory = engines.get(), tmp_path / "run"
    child = Child("train", str(engines.model("opt")), str(directory))
    logged = child.wait_for_steps(directory, 1 if "logged" in moment else LONG_JOB["checkpoint_interval"] + 1)
    time.sleep(random.Random(moment).uniform(0.0, 0.5))
    killed_at = child.kill()
    log = read_seed_log(directory / "seeds.log")
    assert logged <= log.num_steps < LONG_JOB["steps"]
    assert log.records == long_unbroken.steps[: log.num_steps]
    # The contract is a second (the default is half of one); the rest is for a machine whose cores are all busy.
    lost = [killed_at - r["at"] for r in child.reports if r["step"] > log.num_steps]
    assert all(age <= 1.5 for age in lost)
    resumed = train(llm, **LONG_JOB, resume_from=directory)
    assert Trajectory.of(llm, resumed) == long_unbroken
    assert len(resumed.history) == LONG_JOB["steps"] - log.num_steps
    assert [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, LONG_JOB["steps"] + 1)
    )
    assert steps_of(directory) == long_unbroken.steps
