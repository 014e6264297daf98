"""Rollouts in a real engine: programs with the unmodified `openai` client against vLLM's own routes."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from vllm import SamplingParams
from vllm.v1.request import RequestStatus

from tests.engines import Engines, client_of, reviews, scheduler_of
from tests.openai_server import CHAT_TEMPLATE
from tests.trajectories import steps_of
from vllm_zo import EGGROLL, ConfigError, JobError, LoZO, MeZO, Reward, Rollout
from vllm_zo.config import JobConfig
from vllm_zo.entrypoints.llm.handle import FineTuneRun
from vllm_zo.entrypoints.llm.prepare import prepare_job
from vllm_zo.entrypoints.llm.rollouts.client import RolloutClient
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives.base import Trust

JOB: dict[str, Any] = {
    "method": LoZO(rank=2, interval=3, eps=0.3), "learning_rate": 1e-2, "batch_size": 4, "steps": 4, "seed": 5,
    "bases": 2, "progress": False,
}  # fmt: skip
ROWS = reviews(8, seed=1)
LONG = [
    {"sentence": " ".join(f"{row['sentence']} ." for row in reviews(4, seed=seed, longest=12))} for seed in range(8)
]
"""Prompts of more than a KV block (32 tokens), which enter the prefix cache."""


@pytest.fixture(scope="module")
def llm(engines: Engines) -> Any:
    return engines.get(max_num_seqs=16)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: Any) -> Iterator[None]:
    threads = {thread.name for thread in threading.enumerate()}
    yield
    scheduler = scheduler_of(llm)
    assert not scheduler.zo.has_work() and not scheduler._zo_members and not scheduler._zo_probes
    assert not scheduler.running and not scheduler.waiting and not scheduler._zo_ended
    assert all(len(lane.slots.free) == len(lane.slots) for lane in scheduler.zo.queue.lanes)
    # vLLM keeps thread pools that it makes at the first use, and a stuck program keeps its thread.
    left = {thread.name for thread in threading.enumerate()} - threads
    assert not [name for name in left if not name.startswith(("ThreadPoolExecutor", "zo-rollout"))]
    assert "zo-rollout-server" not in left and "zo-rollouts" not in left


def text(answer: Any) -> str:
    return str(answer.choices[0].text)


def worth(written: str) -> float:
    return len(set(written)) / 10


async def two_turns(client: openai.AsyncOpenAI, model: str, row: dict[str, Any]) -> float:
    first = text(await client.completions.create(model=model, prompt=row["sentence"], max_tokens=5, temperature=1))
    prompt = row["sentence"] + first
    return worth(first + text(await client.completions.create(model=model, prompt=prompt, max_tokens=5, temperature=1)))


def finetune(llm: Any, play: Any, rows: Any = ROWS, **options: Any) -> FineTuneRun:
    settings = options.pop("settings", {})
    run: FineTuneRun = llm.finetune(rows, objective=Rollout(play, **settings), **{**JOB, **options})
    return run


def coefficients(run: FineTuneRun) -> list[list[float]]:
    return [record["coefficients"] for record in run.history]


# --- probes answer ----------------------------------------------------------------------------------------------------


def test_each_probe_answers_with_its_own_weights_and_never_from_the_blocks_of_another(llm: Any) -> None:
    """The oracle: a `Reward` job of the same seed writes under the same probes, and members share no cached block."""
    told: dict[tuple[str, str], set[str]] = {}

    def play(client: openai.OpenAI, model: str, row: dict[str, Any]) -> float:
        for _ in range(2):  # the second answer comes from the blocks of the first
            answer = client.completions.create(model=model, prompt=row["sentence"], max_tokens=6, temperature=0)
            told.setdefault((model.partition("/")[2], row["sentence"].strip()), set()).add(text(answer))
        return worth(text(answer))

    written: list[tuple[list[str], list[str]]] = []

    def reward(completions: list[str], prompts: list[str]) -> list[float]:
        written.append((completions, prompts))
        return [worth(completion) for completion in completions]

    greedy = SamplingParams(max_tokens=6, temperature=0)
    base = [out.outputs[0].text for out in llm.generate([r["sentence"] for r in LONG], greedy, use_tqdm=False)]
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    cached = len(pool.cached_block_hash_to_block)
    assert cached >= len(LONG)
    run = finetune(llm, play, LONG)
    assert len(pool.cached_block_hash_to_block) == cached, "the blocks of a probe die with it"
    oracle = llm.finetune(LONG, objective=Reward("{sentence}", reward=reward, max_tokens=6, temperature=0.0), **JOB)
    assert all(len(answers) == 1 for answers in told.values())
    expected = {
        (f"{step}/{index // 4}", prompts[index]): {completion}
        for step, (completions, prompts) in enumerate(written)
        for index, completion in enumerate(completions)
    }
    assert told == expected
    of_base = {row["sentence"].strip(): answer for row, answer in zip(LONG, base, strict=True)}
    assert sum(answer != {of_base[prompt]} for (_, prompt), answer in told.items()) > len(told) / 2
    assert coefficients(run) == coefficients(oracle) and any(c != [0.0] for c in coefficients(run))
    assert [record["rewards"] for record in run.history] == [
        [-r["loss_plus"], -r["loss_minus"]] for r in oracle.history
    ]
    assert all(record["turns"] == 2 and record["tokens"] > 0 for record in run.history)
    assert all(0 <= record["waiting_seconds"] <= record["group_seconds"] for record in run.history)


@pytest.mark.parametrize("method", [LoZO(rank=2, interval=2, eps=0.3), MeZO(eps=0.3)], ids=["slots", "base"])
def test_probes_answer_while_a_fold_job_changes_the_base(llm: Any, method: Any) -> None:
    """`MeZO` writes every probe into the base weights, one after another."""

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [worth(completion) for completion in completions]

    async def play(client: openai.AsyncOpenAI, model: str, row: dict[str, Any]) -> float:
        asked = {"model": model, "prompt": row["sentence"].strip(), "max_tokens": 6, "temperature": 0}
        return worth(text(await client.completions.create(**asked)))

    job = {"update_space": "fold", "bases": None, "method": method, "learning_rate": 1e-3}
    run = finetune(llm, play, LONG, **job)
    llm.restore_base(run)
    oracle = Reward("{sentence}", reward=reward, max_tokens=6, temperature=0.0)
    expected = llm.finetune(LONG, objective=oracle, **{**JOB, **job})
    llm.restore_base(expected)
    assert coefficients(run) == coefficients(expected) and any(c != [0.0] for c in coefficients(run))


def test_every_turn_of_a_row_draws_the_same_numbers_under_all_probes(llm: Any) -> None:
    """Far too small a radius to change a token: all probes then write the same, and turns and steps differ."""
    told: list[tuple[str, str, str]] = []

    async def play(client: openai.AsyncOpenAI, model: str, row: dict[str, Any]) -> float:
        asked = {"model": model, "prompt": row["sentence"], "max_tokens": 6, "temperature": 1}
        turns = [text(await client.completions.create(**asked)) for _ in range(2)]
        assert turns[0] != turns[1]
        told.append((model.rpartition("/")[0].rpartition("/")[2], row["sentence"], "|".join(turns)))
        return 0.0

    tiny = EGGROLL(queries=3, interval=3, eps=1e-7)  # six probes on two slots: they play in waves
    run = finetune(llm, play, method=tiny, learning_rate=0.0, update_space="bank", steps=3)
    assert len(told) == 3 * 6 * 4
    by_row = {(step, sentence): {t for s, q, t in told if (s, q) == (step, sentence)} for step, sentence, _ in told}
    assert len(by_row) == 12 and all(len(of_row) == 1 for of_row in by_row.values())
    assert len(set().union(*by_row.values())) == 12
    assert len(run.history[0]["rewards"]) == 6


def test_a_prompt_that_is_read_in_parts_draws_what_a_whole_one_draws(engines: Engines, llm: Any) -> None:
    """The generators of a CPU cannot take a draw back, and every request of a rollout has a seed."""

    async def play(client: openai.AsyncOpenAI, model: str, row: dict[str, Any]) -> float:
        asked = {"model": model, "prompt": row["sentence"], "max_tokens": 6, "temperature": 1}
        told.append((model.split("/")[1:], row["sentence"], text(await client.completions.create(**asked))))
        return 0.0

    written = []
    for one in (llm, engines.get(max_num_batched_tokens=24, max_num_seqs=8)):
        told: list[Any] = []
        run = finetune(one, play, LONG, learning_rate=0.0, steps=2, settings={"on_failure": "fail"})
        assert len(run.history) == 2
        written.append(sorted(told))
    same = sum(a == b for a, b in zip(*written, strict=True))
    assert same >= 14, f"{same} of 16: a rounding may move one"


def test_a_step_that_is_scored_in_shards_has_the_rewards_of_one_that_is_not(llm: Any) -> None:
    whole, shards = finetune(llm, two_turns, steps=2), finetune(llm, two_turns, steps=2, shards=2)
    for a, b in zip(whole.history, shards.history, strict=True):
        assert a["rewards"] == pytest.approx(b["rewards"], rel=1e-5)
    assert [record["turns"] for record in shards.history] == [2, 2]
    for one, other in zip(coefficients(whole), coefficients(shards), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_probe_answers_all_that_the_routes_of_vllm_know(llm: Any) -> None:
    seen: dict[str, Any] = {}

    async def play(client: openai.AsyncOpenAI, model: str, row: dict[str, Any]) -> float:
        chat: Any = {"model": model, "messages": [{"role": "user", "content": "a film"}], "max_tokens": 8}
        whole = await client.chat.completions.create(**chat, temperature=0, logprobs=True, top_logprobs=2)
        parts = [part async for part in await client.chat.completions.create(**chat, temperature=0, stream=True)]
        streamed = "".join(part.choices[0].delta.content or "" for part in parts)
        assert len(parts) > 2 and streamed == whole.choices[0].message.content
        assert whole.choices[0].logprobs is not None and len(whole.choices[0].logprobs.content or ()) == 8
        choice = {"structured_outputs": {"choice": ["good", "bad"]}}
        chosen = await client.chat.completions.create(**chat, extra_body=choice)
        seen["chosen"] = chosen.choices[0].message.content
        look = {"name": "look", "parameters": {"type": "object", "properties": {}}}
        armed = await client.chat.completions.create(**chat, tools=[{"type": "function", "function": look}])
        seen["ended"] = armed.choices[0].finish_reason
        several = await client.completions.create(model=model, prompt=["a film", "a story"], n=2, max_tokens=2)
        seen["several"] = len(several.choices)
        judged = await client.completions.create(model=llm.llm_engine.model_config.model, prompt="a film", max_tokens=2)
        return float(len(judged.choices))

    tools = {"tool_call_parser": "hermes", "enable_auto_tool_choice": True}
    settings = {"server": {"chat_template": CHAT_TEMPLATE, **tools}, "on_failure": "fail"}
    run = finetune(llm, play, settings=settings, steps=1, batch_size=1)
    assert run.history[0]["rewards"] == [1.0, 1.0]
    assert (
        seen["chosen"] in ("good", "bad") and seen["ended"] in ("length", "stop", "tool_calls") and seen["several"] == 4
    )


def test_who_asks_for_another_model_or_comes_too_late_is_told(llm: Any) -> None:
    kept: list[tuple[Any, str]] = []

    def play(client: openai.OpenAI, model: str, row: dict[str, Any]) -> float:
        for other in (f"{model}0", "no-such-model", "probe:another-job/0/0"):
            with pytest.raises(openai.NotFoundError, match="is .probe:|does not exist"):
                client.completions.create(model=other, prompt="a", max_tokens=1)
        for old, name in kept[:1]:
            with pytest.raises(openai.NotFoundError, match="This rollout has ended"):
                old.completions.create(model=name, prompt="a", max_tokens=1)
            outside = client.with_options(base_url=str(client.base_url).partition("/rollouts")[0] + "/v1")
            with pytest.raises(openai.AuthenticationError):
                outside.completions.create(model=model, prompt="a", max_tokens=1)
        kept.append((client, model))
        return 1.0

    run = finetune(llm, play, settings={"on_failure": "fail", "concurrency": 1}, steps=2, batch_size=1)
    assert len(kept) == 4 and run.history[1]["rewards"] == [1.0, 1.0]


# --- what is learnt ---------------------------------------------------------------------------------------------------


def test_evaluations_play_the_validation_rows_and_a_run_can_be_evaluated(llm: Any) -> None:
    def play(client: openai.OpenAI, model: str, row: dict[str, Any]) -> float:
        if row["label"] == 2:
            raise RuntimeError("no such row")
        evaluates.append(model.endswith("/eval"))
        return 1.0 if row["label"] else 0.25

    evaluates: list[bool] = []
    rows = [{"sentence": "a", "label": label} for label in (0, 1, 1, 2)]
    run = llm.finetune(ROWS, rows, objective=Rollout(play), **{**JOB, "steps": 1})
    assert evaluates == [True] * 3 + [False] * 8 + [True] * 3
    assert run.metrics["reward"] == 0.75 and run.metrics["accuracy"] == pytest.approx(2 / 3)
    assert run.metrics["loss"] == -0.75, "a row whose rollout failed counts for nothing"
    assert run.metrics["dropped"] == run.evaluations[0]["eval_dropped"] == 1, "and shows"
    assert llm.evaluate(rows[:2], Rollout(play), run=run)["reward"] == 0.625
    assert llm.evaluate(rows[:2], Rollout(play))["accuracy"] == 0.5


def test_an_evaluation_samples_each_row_several_times_and_keeps_what_some_have_said(llm: Any) -> None:
    def play(client: openai.OpenAI, model: str, row: dict[str, Any]) -> float:
        answer = client.completions.create(model=model, prompt=row["sentence"], max_tokens=4, temperature=1)
        written.setdefault((model, row["sentence"]), []).append(text(answer))
        return float(len(written[model, row["sentence"]]) == 2)  # the second sample passes

    written: dict[tuple[str, str], list[str]] = {}
    rows = ROWS[:5]
    objective = Rollout(play, concurrency=1, eval_samples=3)
    run = llm.finetune(ROWS, rows, objective=objective, **{**JOB, "steps": 1})
    base = {sentence: texts for (model, sentence), texts in written.items() if model.endswith("/0/eval")}
    assert len(base) == 5 and all(len(set(texts)) > 1 for texts in base.values()), "each sample draws its own numbers"
    assert run.metrics["accuracy"] == pytest.approx(1 / 3) and run.metrics["pass_at_3"] == 1.0
    kept = run.transcripts
    assert kept["base"]["step"] == 0 and kept["newest"]["step"] == 1
    for one, row in zip(kept["base"]["rollouts"], rows, strict=False):
        prompt, answer = one["said"]
        assert prompt == {"role": "prompt", "text": row["sentence"]} and one["reward"] == 0.0
        assert answer == {"role": "assistant", "text": base[row["sentence"]][0]}
    assert len(kept["base"]["rollouts"]) == 3


# --- faults -----------------------------------------------------------------------------------------------------------


def failing_for(row: int, how: Callable[[], Any]) -> Any:
    """A program that fails for one row of the first step, under one of the two probes."""

    async def play(client: openai.AsyncOpenAI, model: str, record: dict[str, Any]) -> Any:
        if record["sentence"] == ROWS[row]["sentence"] and model.endswith("/1"):
            failed = how()
            return await failed if hasattr(failed, "__await__") else failed
        return await two_turns(client, model, record)

    return play


def raising(error: BaseException) -> Callable[[], Any]:
    def how() -> Any:
        raise error

    return how


@pytest.mark.parametrize(
    "how",
    [raising(ValueError("no idea")), lambda: float("nan"), lambda: "good", raising(SystemExit(3))],
    ids=["raises", "nan", "text", "exits"],
)
def test_a_rollout_that_fails_drops_its_row_for_all_probes(llm: Any, how: Any) -> None:
    run = finetune(llm, failing_for(0, how), batch_size=8, steps=2)
    whole = finetune(llm, two_turns, batch_size=8, steps=1)
    assert [record["dropped"] for record in run.history] == [1, 1]
    assert all(record["finite"] for record in run.history) and run.history[0]["coefficients"] != [0.0]
    assert run.history[0]["rewards"] != whole.history[0]["rewards"]


def test_a_slow_rollout_is_given_up_and_its_request_with_it(llm: Any) -> None:
    errors: list[Exception] = []

    def play(client: openai.OpenAI, model: str, row: dict[str, Any]) -> float:
        slow = row["sentence"] == ROWS[0]["sentence"] and model.endswith("/1")
        try:
            while slow:
                client.completions.create(model=model, prompt="a", max_tokens=20)
        except Exception as error:  # the rollout has ended
            errors.append(error)
            raise
        return worth(text(client.completions.create(model=model, prompt=row["sentence"], max_tokens=5)))

    run = finetune(llm, play, batch_size=8, steps=1, settings={"timeout_s": 1.0})
    assert run.history[0]["dropped"] == 1 and run.history[0]["group_seconds"] > 1.0
    deadline = time.monotonic() + 20
    while not errors and time.monotonic() < deadline:
        time.sleep(0.05)
    assert errors, "the program that was given up learns of it"
    assert isinstance(errors[0], openai.APIError), repr(errors[0])


def test_a_client_that_vanishes_takes_its_request_along(llm: Any) -> None:
    """It hangs up in the middle of a stream, of which there is much more to come."""

    async def play(client: openai.AsyncOpenAI, model: str, row: dict[str, Any]) -> float:
        stream = await client.completions.create(model=model, prompt="a", max_tokens=100, stream=True)
        async for _ in stream:
            break
        await stream.close()
        while scheduler_of(llm)._zo_probes:  # the rollout goes on until the engine has let go of it
            await asyncio.sleep(0.01)
        return worth(text(await client.completions.create(model=model, prompt=row["sentence"], max_tokens=2)))

    run = finetune(llm, play, steps=1, settings={"on_failure": "fail", "concurrency": 1, "timeout_s": 60})
    assert len(run.history) == 1 and run.history[0]["turns"] == 2
    assert run.history[0]["tokens"] < 8 * 80, "a part of the 100 tokens of each"


@pytest.mark.slow  # 15 s on one core
def test_a_thousand_rollouts_play_at_once(llm: Any) -> None:
    playing, most = 0, 0

    async def play(client: openai.AsyncOpenAI, model: str, row: dict[str, Any]) -> float:
        nonlocal playing, most
        playing += 1
        most = max(most, playing)
        answer = await client.completions.create(model=model, prompt=row["sentence"], max_tokens=2)
        playing -= 1
        return worth(text(answer))

    rows = [{"sentence": f"film {n} was", "label": 0} for n in range(500)]
    settings = {"on_failure": "fail", "concurrency": 1000, "timeout_s": 300}
    run = finetune(llm, play, rows, steps=2, batch_size=500, settings=settings)
    assert [record["turns"] for record in run.history] == [1, 1] and most == 1000
    assert all(record["dropped"] == 0 and record["finite"] for record in run.history)


def test_a_program_that_blocks_its_event_loop_still_gets_its_answers(llm: Any) -> None:
    async def play(client: openai.AsyncOpenAI, model: str, row: dict[str, Any]) -> float:
        blocking = openai.OpenAI(base_url=str(client.base_url), api_key="none", max_retries=0)
        return worth(text(blocking.completions.create(model=model, prompt=row["sentence"], max_tokens=5)))

    run = finetune(llm, play, steps=1, settings={"on_failure": "fail"})
    assert len(run.history) == 1


def test_failures_can_count_as_a_reward_or_end_the_job_which_then_can_be_resumed(llm: Any, tmp_path: Path) -> None:
    floored = finetune(llm, failing_for(0, raising(ValueError("x"))), settings={"on_failure": "floor", "floor": -50.0},
                       batch_size=8, steps=1)  # fmt: skip
    assert floored.history[0]["rewards"][1] < -5 and floored.history[0]["dropped"] == 0

    def down_from(step: int) -> Any:
        async def play(client: openai.AsyncOpenAI, model: str, row: dict[str, Any]) -> float:
            if int(model.split("/")[1]) >= step:
                raise ConnectionError("the tools are down")
            return await two_turns(client, model, row)

        return play

    whole = finetune(llm, two_turns)
    for on_failure, message in (("fail", "on_failure='fail': ConnectionError"), ("drop", "every row.*tools are down")):
        directory = tmp_path / on_failure
        with pytest.raises(JobError, match=message):
            finetune(llm, down_from(2), settings={"on_failure": on_failure}, output_dir=str(directory))
        assert steps_of(directory) == steps_of(whole.directory)[:2]


# --- a step that is taken again ---------------------------------------------------------------------------------------


def test_a_step_that_was_cut_off_is_taken_again_with_the_same_seeds(llm: Any, tmp_path: Path) -> None:
    """Twice: vLLM aborts everything in the middle of a step (sleep, pause), and the process dies in the middle of one.

    A kill leaves the job's directory as it is; the test copies it from inside a rollout.
    """
    copy, calls = tmp_path / "copy", []

    async def play(client: openai.AsyncOpenAI, model: str, row: dict[str, Any]) -> float:
        step = int(model.split("/")[1])
        calls.append((step, model))
        reward = await two_turns(client, model, row)
        if step == 2 and not copy.exists():
            time.sleep(1.5)  # the log is written once a second
            shutil.copytree(tmp_path / "job", copy)
        if step == 1 and not interrupted.is_set():
            interrupted.set()
            await client.completions.create(model=model, prompt="a", max_tokens=100)  # its answer never comes
        return reward

    whole = finetune(llm, two_turns)
    interrupted = threading.Event()
    objective = Rollout(play)
    options = {name: value for name, value in JOB.items() if name != "progress"}
    config = JobConfig.from_options({**options, "objective": objective, "output_dir": str(tmp_path / "job")})
    job = prepare_job(llm.llm_engine, ROWS, None, None, config, trust=Trust.IMPORTS)
    with RolloutClient(llm.llm_engine, JobDir(job.directory), objective) as client:
        run = FineTuneRun(client, job.directory, job.config, job.model)
        client.call("zo_start", str(job.directory))
        while not (interrupted.is_set() and scheduler_of(llm)._zo_probes):
            client.advance()
        scheduler_of(llm).finish_requests(None, RequestStatus.FINISHED_ABORTED)
        run.wait()
    assert coefficients(run) == coefficients(whole) and steps_of(run.directory) == steps_of(whole.directory)
    assert sum(step == 1 for step, _ in calls) > 8, "a part of the step was played twice"
    assert len(steps_of(copy)) == 2
    objective = Rollout(play)
    resumed = llm.finetune(ROWS, objective=objective, resume_from=copy, **JOB)
    assert coefficients(resumed) == coefficients(whole)[2:] and steps_of(copy) == steps_of(whole.directory)


def test_a_job_that_is_cancelled_in_the_middle_leaves_nothing(llm: Any) -> None:
    waits = threading.Event()

    def play(client: openai.OpenAI, model: str, row: dict[str, Any]) -> float:
        waits.set()
        client.completions.create(model=model, prompt="a", max_tokens=100)
        raise KeyError("unreachable")

    job = prepare_job(
        llm.llm_engine, ROWS, None, None, JobConfig(objective=Rollout(play), batch_size=4), trust=Trust.IMPORTS
    )
    with RolloutClient(llm.llm_engine, JobDir(job.directory), Rollout(play)) as client:
        run = FineTuneRun(client, job.directory, job.config, job.model)
        client.call("zo_start", str(job.directory))
        while not (waits.is_set() and scheduler_of(llm)._zo_probes):
            client.advance()
        run.cancel()
    assert run.status == "cancelled" and run.history == []
    while client_of(llm).advance():
        pass


def test_what_cannot_work_is_refused_before_any_work(llm: Any) -> None:
    with pytest.raises(ConfigError, match="wait=False: rollouts are played while finetune waits"):
        finetune(llm, two_turns, wait=False)
    with pytest.raises(ConfigError, match="chat=.*renders chats of the data.*Rollout.server="):
        finetune(llm, two_turns, chat={"chat_template": "x"})
    with pytest.raises(ConfigError, match="play='no_such_module:f' cannot be imported"):
        finetune(llm, "no_such_module:f")
    with pytest.raises(ConfigError, match="unknown server argument of a rollout.*chat_template"):
        finetune(llm, two_turns, settings={"server": {"chat_templat": "x"}})
    with pytest.raises(ConfigError, match="not allowed here"):
        prepare_job(llm.llm_engine, ROWS, None, None, JobConfig(objective=Rollout("os:system")))
    assert llm.generate(["a film of"], use_tqdm=False)[0].outputs[0].token_ids
