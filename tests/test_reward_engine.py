"""Reward-driven training in a real engine: what is sampled, who waits, what is recorded, and how it fails."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import SENTIMENT, Engines, client_of, reviews, scheduler_of
from tests.trajectories import base_weights, steps_of
from vllm_zo import JobError, LoZO, Reward
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.checkpoint.snapshot import load_snapshot
from vllm_zo.config import JobConfig
from vllm_zo.entrypoints.llm.handle import FineTuneRun
from vllm_zo.entrypoints.llm.prepare import prepare_evaluation, prepare_job
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.status import JobStatus
from vllm_zo.objectives.base import Trust

Calls = list[tuple[list[str], dict[str, Any]]]
PROMPT = "{sentence} It was"
JOB: dict[str, Any] = {
    "method": LoZO(rank=2, interval=3, eps=0.3), "learning_rate": 1e-2, "batch_size": 4, "steps": 6, "seed": 5,
    "bases": 2, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(engines: Engines) -> Any:
    return engines.get(max_num_seqs=16)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: Any) -> Iterator[None]:
    yield
    scheduler = scheduler_of(llm)
    assert not scheduler.zo.has_work() and not scheduler._zo_members
    assert not scheduler.running and not scheduler.waiting
    assert all(len(lane.slots.free) == len(lane.slots) for lane in scheduler.zo.queue.lanes)


def variety(completions: list[str], **columns: Any) -> list[float]:
    return [len(set(text)) / 10 for text in completions]


def started(llm: Any, rows: Any = None, **options: Any) -> FineTuneRun:
    """A job that has been started and that nobody waits for yet; the test steps the engine."""
    options = {name: value for name, value in {**JOB, **options}.items() if name != "progress"}
    config = JobConfig.from_options(options)
    job = prepare_job(llm.llm_engine, rows or reviews(8, seed=1), None, None, config, trust=Trust.IMPORTS)
    run = FineTuneRun(client_of(llm), job.directory, job.config, job.model)
    client_of(llm).call("zo_start", str(job.directory))
    return run


def recording(calls: Calls) -> Any:
    def reward(completions: list[str], **columns: Any) -> list[float]:
        calls.append((completions, columns))
        return variety(completions)

    return reward


def test_every_probe_continues_the_same_prompts_and_the_record_shows_their_rewards(llm: Any) -> None:
    calls: Calls = []
    rows = reviews(24, seed=1)
    run = llm.finetune(rows, reviews(5, seed=2), objective=Reward(PROMPT, reward=recording(calls), max_tokens=6), **JOB)
    first, *groups, last = calls
    assert len(first[0]) == len(last[0]) == 5 and len(groups) == JOB["steps"]
    assert first[1]["label"] == [row["label"] for row in reviews(5, seed=2)]
    for (completions, columns), record in zip(groups, run.history, strict=True):
        assert len(completions) == 8 and columns["prompts"][:4] == columns["prompts"][4:]
        assert [p.removesuffix(" It was") for p in columns["prompts"]] == columns["sentence"]
        rewards = variety(completions)
        plus, minus = sum(rewards[:4]) / 4, sum(rewards[4:]) / 4
        assert record["loss_plus"] == pytest.approx(-plus) and record["loss_minus"] == pytest.approx(-minus)
        assert record["reward"] == -record["loss"] == pytest.approx((plus + minus) / 2)
        assert record["coefficients"] == pytest.approx([(minus - plus) / (2 * 0.3)], rel=1e-4, abs=1e-6)
    assert run.metrics["reward"] == -run.metrics["loss"]
    assert any(record["coefficients"] != [0.0] for record in run.history)


def test_completions_are_those_of_generate_under_the_same_seed(llm: Any) -> None:
    """Far too small a radius to change a token: both probes then sample what the base samples."""
    from vllm import SamplingParams

    calls: Calls = []
    objective = Reward(PROMPT, reward=recording(calls), max_tokens=6, samples=2)
    llm.finetune(
        reviews(8, seed=1), objective=objective, **{**JOB, "steps": 2, "method": LoZO(eps=1e-7), "learning_rate": 0.0}
    )
    for completions, _ in calls:
        assert completions[:8] == completions[8:]  # common random numbers
    (first, _), (second, _) = calls
    assert first[0] != first[1]  # two samples of one prompt
    assert len(set(first) | set(second)) > 8  # seeds change with step and example
    calls.clear()
    greedy = llm.evaluate(reviews(8, seed=1), objective)
    params = SamplingParams(max_tokens=6, temperature=0.0)
    prompts = [f"{row['sentence'].strip()} It was" for row in reviews(8, seed=1)]
    expected = [out.outputs[0].text for out in llm.generate(prompts, params, use_tqdm=False)]
    assert calls[0][0][::2] == expected
    assert greedy["reward"] == pytest.approx(sum(variety(expected)) / 8)


def test_completions_end_and_are_sampled_as_generation_config_says(engines: Engines, tmp_path: Path) -> None:
    """As in serving: 60 of 512 tokens are ends of this model, and what has been written is unlikely to come again."""
    model = shutil.copytree(engines.model("llama"), tmp_path / "model")
    generation = {"eos_token_id": [2, *range(300, 360)], "repetition_penalty": 1.5, "temperature": 0.4, "top_k": 3}
    (model / "generation_config.json").write_text(json.dumps(generation))
    engines.add("ends", model)
    llm = engines.get("ends")
    rows = reviews(16, seed=1)
    calls: Calls = []
    objective = Reward(PROMPT, reward=recording(calls), max_tokens=20, stop=["z"])
    llm.evaluate(rows, objective)
    prompts = [f"{row['sentence'].strip()} It was" for row in rows]
    params = llm.get_default_sampling_params()
    params.max_tokens, params.temperature, params.stop = 20, 0.0, ["z"]
    outputs = [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]
    assert calls[0][0] == [out.text for out in outputs]
    assert any(out.stop_reason in range(300, 360) for out in outputs) and len({out.text for out in outputs}) > 8
    calls.clear()
    llm.finetune(rows, objective=objective, **{**JOB, "steps": 2, "method": LoZO(eps=1e-7), "learning_rate": 0.0})
    assert [len(completions) for completions, _ in calls] == [8, 8]
    assert all(completions[:4] == completions[4:] for completions, _ in calls)


def test_a_resumed_run_is_the_unbroken_one_and_its_log_alone_rebuilds_the_state(llm: Any, tmp_path: Path) -> None:
    objective = Reward(PROMPT, reward=variety, max_tokens=4, shaping="zscore")
    job = {**JOB, "objective": objective}
    whole = llm.finetune(reviews(24, seed=1), **job)
    assert len({tuple(r["coefficients"]) for r in whole.history}) > 2
    cut_off = started(llm, reviews(24, seed=1), output_dir=str(tmp_path / "job"), objective=objective)
    while len(cut_off.history) < 3:
        assert client_of(llm).advance()
        cut_off.poll()
    cut_off.cancel()
    done = len(steps_of(tmp_path / "job"))
    assert 3 <= done < JOB["steps"]
    resumed = llm.finetune(reviews(24, seed=1), resume_from=tmp_path / "job", **job)
    assert steps_of(resumed.directory) == steps_of(whole.directory)
    log = read_seed_log(whole.directory / "seeds.log")
    rebuilt, published = rebuild_state(log, log.num_steps), log.header.new_state()
    load_snapshot(whole.version_file, published)
    assert torch.equal(rebuilt.acc_BN, published.acc_BN) and rebuilt.acc_BN.abs().max() > 0


def test_requests_and_other_jobs_go_on_while_a_group_waits_for_its_rewards(engines: Engines) -> None:
    llm = engines.get(zo_training={"slots": 2, "concurrent_jobs": 2})
    scheduler, client = scheduler_of(llm), client_of(llm)
    asked, answer = threading.Event(), threading.Event()

    def slow(completions: list[str], **columns: Any) -> list[float]:
        asked.set()
        assert answer.wait(60)
        return variety(completions)

    run = started(llm, objective=Reward(PROMPT, reward=slow, max_tokens=4), steps=1)
    while not asked.is_set():
        assert client.advance()
    other = llm.finetune(reviews(24, seed=1), **{**JOB, "objective": SENTIMENT})
    assert other.status == JobStatus.SUCCEEDED and len(other.history) == JOB["steps"]
    assert llm.generate(["a film of"], use_tqdm=False)[0].outputs[0].token_ids
    run.poll()
    assert run.history == [] and run.status == "running"
    answer.set()
    run.wait()
    assert len(run.history) == 1 and run.status == JobStatus.SUCCEEDED
    assert not scheduler.zo.has_work()


# --- failures ---------------------------------------------------------------------------------------------------------


def failing_at(call: int, answer: Any) -> Any:
    """A reward that is fine until its `call`-th time, and then raises, sleeps or answers nonsense."""
    calls = []

    def reward(completions: list[str], **columns: Any) -> Any:
        calls.append(completions)
        if len(calls) <= call:
            return variety(completions)
        return answer(completions)

    return reward


def raises(completions: list[str]) -> list[float]:
    raise ValueError("no idea")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (raises, "raised ValueError: no idea"),
        (lambda completions: [1.0], "returned 1 numbers for 8 completions"),
        (lambda completions: [float("nan")] * len(completions), "is nan for completion"),
        (lambda completions: time.sleep(20), "did not answer within timeout_s=0.3"),
    ],
    ids=["raises", "length", "nan", "slow"],
)
def test_a_reward_that_fails_ends_its_job_and_leaves_the_state_of_the_steps_before(
    llm: Any, tmp_path: Path, answer: Any, message: str
) -> None:
    directory = tmp_path / "job"
    good = {**JOB, "objective": Reward(PROMPT, reward=variety, max_tokens=4)}
    whole = llm.finetune(reviews(24, seed=1), **good)
    timeout_s = 0.3 if "timeout_s" in message else 30.0  # on a busy machine the good answers may take longer than that
    bad = Reward(PROMPT, reward=failing_at(3, answer), max_tokens=4, timeout_s=timeout_s)
    with pytest.raises(JobError, match=message):
        llm.finetune(reviews(24, seed=1), output_dir=str(directory), **{**JOB, "objective": bad})
    summary = scheduler_of(llm).zo.queue.status("job")
    assert summary["status"] == JobStatus.FAILED and summary["step"] == 3
    assert steps_of(directory) == steps_of(whole.directory)[:3]
    assert llm.generate(["a film of"], use_tqdm=False)[0].outputs[0].token_ids


def test_a_reward_that_cannot_be_loaded_is_refused_before_any_work(llm: Any) -> None:
    with pytest.raises(ConfigError, match="reward='no_such_module:f' cannot be imported"):
        llm.finetune(reviews(8), objective=Reward(PROMPT, reward="no_such_module:f"), **JOB)


def test_code_is_refused_to_those_who_may_not_run_it(llm: Any) -> None:
    objective = Reward(PROMPT, reward="os:system")
    with pytest.raises(ConfigError, match="reward='os:system'.*not allowed here"):
        prepare_job(llm.llm_engine, reviews(8), None, None, JobConfig(objective=objective))
    with pytest.raises(ConfigError, match="reward='os:system'.*not allowed here"):
        prepare_evaluation(llm.llm_engine, reviews(8), objective, None)


# --- pressure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["generating", "scoring"])
def test_cancelled_while_members_generate_or_rewards_are_awaited(llm: Any, when: str) -> None:
    reached = threading.Event()

    def slow(completions: list[str], **columns: Any) -> list[float]:
        reached.set()
        time.sleep(0.5)
        return variety(completions)

    client = client_of(llm)
    run = started(llm, objective=Reward(PROMPT, reward=slow, max_tokens=8))
    while not (scheduler_of(llm)._zo_members if when == "generating" else reached.is_set()):
        assert client.advance()
    run.cancel()
    assert run.status == "cancelled" and run.history == []
    while client.advance():
        pass


def test_more_members_than_sequences_give_the_same_run(engines: Engines, llm: Any) -> None:
    job = {**JOB, "objective": Reward(PROMPT, reward=variety, max_tokens=4), "steps": 3}
    wide = llm.finetune(reviews(24, seed=1), **job)
    narrow = engines.get(max_num_seqs=4).finetune(reviews(24, seed=1), **job)
    for a, b in zip(wide.history, narrow.history, strict=True):
        assert a["coefficients"] == pytest.approx(b["coefficients"], abs=1e-6)


# --- with what else a job may want ------------------------------------------------------------------------------------


def test_rewards_change_the_base_in_fold_space_and_it_comes_back(llm: Any) -> None:
    before = base_weights(llm)
    job = {**JOB, "bases": None, "update_space": "fold", "objective": Reward(PROMPT, reward=variety, max_tokens=4)}
    run = llm.finetune(reviews(24, seed=1), **job)
    assert run.status == JobStatus.SUCCEEDED and any(record["coefficients"] != [0.0] for record in run.history)
    assert any(not torch.equal(weight, before[name]) for name, weight in base_weights(llm).items())
    llm.restore_base(run)
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(llm).items())
