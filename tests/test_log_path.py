"""The log path on one engine: shards are scored apart, the scheduler decides and logs, the workers apply the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines import Engines, reviews, scheduler_of
from tests.test_durability import interrupted
from tests.trajectories import LOZO, SPACES, STEPS, Trajectory, cut_copy, steps_of, train
from vllm_zo import EGGROLL, Adam, ConfigError, LoZO, Reward
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.commands import ApplyRecord, CloseGroup, ReportCells

FOUR = LoZO(rank=2, interval=3, eps=1e-2, queries=4)


@pytest.mark.parametrize("space", SPACES)
def test_a_step_in_one_shard_is_the_step_of_the_device_path_bit_for_bit(engines: Engines, space: str) -> None:
    llm = engines.get()
    device = Trajectory.of(llm, train(llm, space))
    assert Trajectory.of(llm, train(llm, space, shards=1)) == device


@pytest.mark.parametrize(
    "name, options",
    {
        "examples": {"shards": 3},
        "directions": {"shards": 2, "method": FOUR},
        "a grid": {"shards": 9, "method": FOUR},
        "directions that take their number's columns": {"shards": 2, "method": EGGROLL(queries=2, eps=1e-2)},
        "an optimizer with state": {"shards": 2, "method": LoZO(rank=2, interval=3, eps=1e-2, optimizer=Adam())},
    }.items(),
)
def test_shards_take_the_steps_of_the_whole(engines: Engines, name: str, options: dict[str, Any]) -> None:
    """Within float32: a shard is a batch of its own, and the CPU's products depend on the size of a batch."""
    llm = engines.get()
    space = "fold" if isinstance(options.get("method"), EGGROLL) else "bank"
    whole = Trajectory.of(llm, train(llm, space, **{**options, "shards": None}))
    run = train(llm, space, **options)
    sharded = Trajectory.of(llm, run)
    assert read_seed_log(run.directory / "seeds.log").header.job_config["shards"] == options["shards"]
    for mine, theirs in zip(sharded.steps, whole.steps, strict=True):
        assert mine.learning_rate == theirs.learning_rate and mine.finite and theirs.finite
        torch.testing.assert_close(
            torch.tensor(mine.coefficients), torch.tensor(theirs.coefficients), rtol=1e-3, atol=2e-2
        )
    assert Trajectory.of(llm, train(llm, space, **options)) == sharded, "the same job takes the same steps"


def test_the_log_is_the_state(engines: Engines) -> None:
    llm = engines.get()
    run = train(llm, shards=2, validation=reviews(8, seed=3), eval_interval=4)
    log = read_seed_log(run.directory / "seeds.log")
    for step in run.published:
        published = rebuild_state(log, step, snapshot=run.directory / f"step-{step}.safetensors")
        assert torch.equal(published.acc_BN, rebuild_state(log, step).acc_BN), f"published after step {step}"
    assert run.published == [0, 4, 8, STEPS] and [e["step"] for e in run.evaluations] == [0, 4, 8, STEPS]
    assert len(run.history) == STEPS and torch.isfinite(torch.tensor([r["loss"] for r in run.history])).all()


def test_nothing_is_applied_before_the_whole_step_is_in_the_log(engines: Engines, monkeypatch: Any) -> None:
    llm = engines.get()
    controller = scheduler_of(llm).zo
    told: list[Any] = []
    tell = controller._tell

    def spy(commands: Any, **where: Any) -> None:
        for command in commands:
            if isinstance(command, ApplyRecord):
                job = controller.queue.get(command.job_id)
                assert command.record.step == job.recorded - 1, "logged, then applied"
            assert not isinstance(command, CloseGroup) or command.learning_rate is None
            told.append(command)
        tell(commands, **where)

    monkeypatch.setattr(controller, "_tell", spy)
    run = train(llm, shards=2)
    reports = [c for c in told if isinstance(c, ReportCells)]
    applied = [c.record for c in told if isinstance(c, ApplyRecord)]
    assert len(reports) == 2 * STEPS and tuple(applied) == steps_of(run.directory)


def test_a_run_resumed_at_any_step_is_the_unbroken_run(engines: Engines, tmp_path: Path) -> None:
    llm = engines.get()
    whole = train(llm, shards=3, checkpoint_interval=6)
    expected = Trajectory.of(llm, whole)
    for step in (0, 1, 7, STEPS):
        directory = cut_copy(whole.directory, tmp_path / f"cut-{step}", step, snapshot=step > 6)
        assert Trajectory.of(llm, train(llm, shards=3, resume_from=directory)) == expected, f"after {step} steps"
    with pytest.raises(ConfigError, match=r"shards=2 \(started with 3\)"):
        train(llm, shards=2, resume_from=whole.directory)


def test_a_job_that_pauses_in_the_middle_of_a_step_goes_on_where_it_was(engines: Engines) -> None:
    llm = engines.get()
    expected = Trajectory.of(llm, train(llm, shards=3))
    for engine_steps in range(4):
        run = interrupted(llm, 3, shards=3)
        for _ in range(engine_steps):
            llm.llm_engine.step()
        scheduler = scheduler_of(llm)
        scheduler.zo_calls.zo_pause(run.job_id)
        while scheduler.has_requests():
            llm.llm_engine.step()
        run.poll()
        assert run.status == "paused"
        scheduler.zo_calls.zo_resume(run.job_id)
        assert Trajectory.of(llm, run.wait()) == expected, f"paused after {engine_steps} engine steps"


def test_shards_of_completions_are_rewarded_apart_and_shaped_together(engines: Engines) -> None:
    llm = engines.get()
    reward = Reward("{sentence}", reward=letters_written, max_tokens=4, samples=2, shaping="zscore")
    options: dict[str, Any] = {"objective": reward, "steps": 3, "learning_rate": 1e-3}
    whole, parts = (train(llm, method=LOZO, shards=shards, **options) for shards in (1, 2))
    assert [r["reward"] for r in whole.history] == [r["reward"] for r in parts.history]
    assert steps_of(whole.directory) == steps_of(parts.directory), "rewards are whole numbers: no rounding between them"


def letters_written(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def test_the_reference_takes_the_same_steps(engines: Engines) -> None:
    assert_the_reference_takes_the_steps_of(train(engines.get(), shards=3), engines.model("opt"))


def assert_the_reference_takes_the_steps_of(run: Any, model: Path) -> None:
    """`tests/reference.py` on plain transformers must decide the coefficients of the log, to rounding."""
    from tests.reference import ReferenceTrainer
    from vllm_zo.data import BatchOrder
    from vllm_zo.jobs.directory import JobDir

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference = ReferenceTrainer(
        loaded, LOZO, run.config.objective, job_seed=run.config.seed, update_space="bank", num_bases=2
    )
    examples = JobDir(run.directory).read_train()
    order = BatchOrder(len(examples), run.config.batch_size, run.config.seed)
    for record in steps_of(run.directory):
        batch = [examples[i] for i in order.batch(record.step)]
        _, coefficients = reference.step(record.step, batch, record.learning_rate)
        torch.testing.assert_close(torch.tensor(record.coefficients), coefficients, rtol=1e-3, atol=2e-2)
