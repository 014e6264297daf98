"""The engine in a process of its own, as vLLM starts it by default: jobs, traffic, failures and ends cross the border.

The engine is made once for all tests; `Child` programs are for what ends the front end itself.
"""

from __future__ import annotations

import asyncio
import json
import signal
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.async_llm import AsyncLLM

from tests.children import ENDLESS, ONE_PROCESS, Child
from tests.engines import SENTIMENT, Engines, reviews
from tests.test_durability import interrupted
from tests.test_seams import PROMPTS
from tests.test_serving import GREEDY, answers, assert_agree, margin
from tests.trajectories import JOB, SPACES, Trajectory, steps_of, train
from vllm_zo import ConfigError, JobError, LoZO, Reward, Rollout
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.entrypoints.llm.client import EngineClient

PROMPTLY_S = 20.0
"""From the signal to the last process gone. vLLM takes 4 to 5 s on a quiet machine, for an engine without work too."""


@pytest.fixture
def llm(engine_apart: Any) -> Any:
    return engine_apart


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def wait_for_steps(run: Any, count: int) -> None:
    def taken() -> bool:
        run.poll()
        return len(run.history) >= count

    wait_until(taken)


def ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def assert_complete_and_resumable(llm: Any, directory: Path) -> None:
    """Every step that was made is in the log, and an engine takes the steps after it that an unbroken run takes."""
    log = read_seed_log(directory / "seeds.log")
    recorded = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((directory / "summary.json").read_text())
    assert log.intact and 0 < log.num_steps == summary["step"] < ENDLESS["steps"], "closed in good order"
    assert recorded == list(range(1, log.num_steps + 1)), "metrics are written at once, the log on the way out"
    made = []
    for where in ({"resume_from": directory}, {}):
        run = interrupted(llm, log.num_steps + 5, **ENDLESS, **where)
        run.cancel()
        made.append(steps_of(run.directory))
    resumed, unbroken = made
    both = min(len(resumed), len(unbroken))
    assert both >= log.num_steps + 5 and resumed[:both] == unbroken[:both]


# --- jobs and traffic -------------------------------------------------------------------------------------------------


def test_the_worker_of_an_engine_whose_threads_are_not_bound_has_no_process_of_its_own(llm: Any) -> None:
    of_vllm = [" ".join(child.cmdline()) for child in engine_process(llm).children(recursive=True)]
    assert not any("VLLM::" in title for title in of_vllm), of_vllm


def test_a_job_takes_the_steps_that_it_takes_in_process(engines: Engines, llm: Any) -> None:
    followed: list[int] = []
    run = train(llm, callbacks=[lambda run, record: followed.append(record["step"])])
    inside = engines.get()
    assert Trajectory.of(llm, run) == Trajectory.of(inside, train(inside))
    assert followed == list(range(1, JOB["steps"] + 1)) == [record["step"] for record in run.history]


def test_generating_during_a_job_gives_the_answers_of_the_base(llm: Any) -> None:
    alone = answers(llm)
    run = train(llm, **ENDLESS, wait=False)
    wait_for_steps(run, 5)
    for _ in range(5):
        assert_agree(answers(llm), alone)
    seen = len(run.history)
    wait_for_steps(run, seen + 5)
    assert run.status == "running"
    with pytest.raises(ConfigError, match=f"job_id='{run.job_id}' is taken and running"):
        train(llm, **ENDLESS, resume_from=run.directory)
    run.stop()
    run.wait()
    assert run.status == "succeeded" and len(run.history) < ENDLESS["steps"]
    assert [tokens for tokens, _ in answers(llm, lora_request=run.lora_request)] != [tokens for tokens, _ in alone]
    assert_agree(answers(llm), alone)


async def play(client: Any, model: str, row: dict[str, Any]) -> float:
    """A rollout of two turns."""
    text = row["sentence"]
    for _ in range(2):
        answer = await client.completions.create(model=model, prompt=text, max_tokens=5, temperature=1)
        text += answer.choices[0].text
    return len(set(text)) / 10


PLAYED = {**JOB, "objective": Rollout(play), "steps": 4, "batch_size": 4, "method": LoZO(rank=2, interval=3, eps=0.3)}


def test_rollouts_are_played_from_here_and_bring_what_they_bring_in_process(engines: Engines, llm: Any) -> None:
    rows = reviews(8, seed=1), reviews(3, seed=2)
    apart, inside = (one.finetune(*rows, **PLAYED) for one in (llm, engines.get()))
    assert steps_of(apart.directory) == steps_of(inside.directory)
    assert any(record["coefficients"] != [0.0] for record in apart.history)
    assert apart.metrics["reward"] == inside.metrics["reward"]
    assert answers(llm)


def test_a_job_that_fails_raises_here_and_the_engine_goes_on(llm: Any) -> None:
    alone = answers(llm)
    with pytest.raises(JobError, match="failed: the training loss .*; its log is in"):
        train(llm, steps=200, learning_rate=1e37)
    assert_agree(answers(llm), alone)
    assert train(llm).status == "succeeded"


def told_by_a_file(completions: list[str], asked: list[str], told: list[str], **columns: Any) -> list[float]:
    """A reward that answers once the file `told` is there."""
    Path(asked[0]).touch()
    while not Path(told[0]).exists():
        time.sleep(0.01)
    return [float(len(text)) for text in completions]


def test_an_engine_that_waits_for_rewards_rests_and_hears_what_it_is_asked(llm: Any, tmp_path: Path) -> None:
    asked, told = tmp_path / "asked", tmp_path / "told"
    rows = [{**row, "asked": str(asked), "told": str(told)} for row in reviews(8)]
    job = {**JOB, "objective": Reward("{sentence} It was", reward=told_by_a_file, max_tokens=4), "steps": 2}
    alone = answers(llm)
    runs = []
    for _ in range(2):
        asked.unlink(missing_ok=True)
        runs.append(llm.finetune(rows, wait=False, **job))
        wait_until(asked.exists)
        assert_agree(answers(llm), alone)
        if len(runs) == 1:
            assert cpu_seconds(engine_process(llm), during_s=1.0) < 0.3, "no empty steps until rewards come"
            runs[0].cancel()
            assert runs[0].status == "cancelled", "heard, and the slots are free for the next job"
    told.touch()
    runs[1].wait()
    assert runs[1].status == "succeeded" and len(runs[1].history) == 2


def test_a_request_for_an_adapter_whose_files_are_gone_is_refused_and_the_engine_lives(
    llm: Any, tmp_path: Path
) -> None:
    """A client may remove a model while another's request for it is on its way."""
    gone = LoRARequest("gone", 4712, str(tmp_path / "gone"))
    refused = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=2), lora_request=gone, use_tqdm=False)[0].outputs[0]
    assert refused.finish_reason == "error" and "no adapter_config.json there" in refused.stop_reason
    assert llm.generate([PROMPTS[0]], SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].token_ids


def engine_process(llm: Any) -> psutil.Process:
    (core,) = llm.llm_engine.engine_core.resources.engine_manager.processes
    return psutil.Process(core.pid)


def cpu_seconds(process: psutil.Process, during_s: float) -> float:
    before = process.cpu_times()
    time.sleep(during_s)
    after = process.cpu_times()
    return float(after.user - before.user + after.system - before.system)


def test_a_request_behind_the_start_of_a_fold_job_is_refused_and_the_engine_lives(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM prepares a request while the engine still reads the job: only the loop itself knows who came first."""
    call = EngineClient.call

    def send_start(client: EngineClient, method: str, *args: Any) -> Any:
        if method != "zo_start":
            return call(client, method, *args)
        core = llm.llm_engine.engine_core
        core.utility_results[1] = Future()
        return core._send_input(EngineCoreRequestType.UTILITY, (0, 1, method, args))

    monkeypatch.setattr(EngineClient, "call", send_start)
    run = llm.finetune(reviews(4000), **{**JOB, **SPACES["fold"], "steps": 10_000}, wait=False)
    refused = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0]
    assert (refused.finish_reason, refused.text) == ("error", "")
    assert refused.stop_reason.startswith(f"update_space='fold' in job {run.job_id}: the base weights change")
    run.cancel()
    llm.restore_base(run)
    assert llm.generate([PROMPTS[0]], SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].text


# --- the async engine -------------------------------------------------------------------------------------------------


async def async_answers(engine: AsyncLLM) -> list[tuple[list[int], list[float]]]:
    """`answers` of an AsyncLLM: all prompts at once."""

    async def ask(prompt: str) -> tuple[list[int], list[float]]:
        async for output in engine.generate(prompt, GREEDY, request_id=uuid.uuid4().hex):
            completion = output.outputs[0]
        margins = [margin([p.logprob for p in step.values()]) for step in completion.logprobs]
        return list(completion.token_ids), margins

    return await asyncio.gather(*[ask(prompt) for prompt in PROMPTS])


async def serve_and_train(engine: AsyncLLM) -> Any:
    """Everything at once on one event loop; returns a finished run."""
    rows, options = reviews(24, seed=1), {**JOB, **SPACES["bank"]}
    alone = await async_answers(engine)
    endless = await engine.finetune(rows, **options | ENDLESS, wait=False)
    for _ in range(3):
        assert_agree(await async_answers(engine), alone)
        seen = len(endless.history)
        while len(endless.history) <= seen:
            await endless.poll()
    assert endless.status == "running"
    await endless.stop()
    assert len((await endless.wait()).history) < ENDLESS["steps"]

    runs: list[Any] = []
    task = asyncio.create_task(engine.finetune(rows, **options | ENDLESS, callbacks=[lambda run, _: runs.append(run)]))
    while not runs:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert runs[0].status == "cancelled"
    with pytest.raises(JobError, match="failed: the training loss"):
        await engine.finetune(rows, **options | {"steps": 200, "learning_rate": 1e37})

    played = await engine.finetune(reviews(8, seed=1), reviews(3, seed=2), **PLAYED)
    assert len(played.history) == 4 and any(record["coefficients"] != [0.0] for record in played.history)
    with pytest.raises(ConfigError, match="wait=False: rollouts are played while finetune waits"):
        await engine.finetune(rows, **PLAYED, wait=False)

    run = await engine.finetune(rows, **options)
    loss = (await engine.evaluate(rows, run=run))["loss"], (await engine.evaluate(rows, SENTIMENT))["loss"]
    assert not [*Path(tempfile.gettempdir()).glob("vllm-zo-evaluate-*")]
    assert abs(loss[0] - loss[1]) > 1e-3
    assert_agree(await async_answers(engine), alone)
    return run


def test_an_async_engine_serves_while_it_trains_and_takes_the_same_steps(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def scenario() -> Any:
        options = {"max_model_len": 128, "dtype": "float32", "block_size": 32, "zo_training": True, **ONE_PROCESS}
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(engines.model("opt")), **options))
        try:
            return await serve_and_train(engine)
        finally:
            engine.shutdown()

    inside = engines.get()
    assert Trajectory.of(inside, asyncio.run(scenario())) == Trajectory.of(inside, train(inside))


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_front_end_ended_by_sigterm_takes_its_engine_along(engines: Engines, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    child = Child("train_apart", str(engines.model("opt")), str(directory), VLLM_ENABLE_V1_MULTIPROCESSING="1")
    child.wait_for_steps(directory, 1)
    processes = psutil.Process(child.process.pid).children(recursive=True)
    assert any("EngineCore" in " ".join(process.cmdline()) for process in processes), "no engine process"
    child.process.send_signal(signal.SIGTERM)
    try:
        wait_until(lambda: all(ended(process) for process in processes), PROMPTLY_S)
    finally:
        for process in processes:
            if not ended(process):
                process.kill()
    assert child.process.wait(PROMPTLY_S) == -signal.SIGTERM
    assert_complete_and_resumable(engines.get(), directory)
