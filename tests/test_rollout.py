"""Rollouts without an engine: the objective, the group as the controller sees it, the pool, and the addresses."""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from tests.test_rewarder import PLENTY, Recorder
from vllm_zo import EGGROLL, ConfigError, JobConfig, Rollout
from vllm_zo.commands import CloseGroup, GroupResult, Materialise, OpenGroup, StartJob, ZOResults
from vllm_zo.engine.admission import UNLIMITED
from vllm_zo.engine.controller import Controller
from vllm_zo.engine.job import Job
from vllm_zo.engine.rollouts import Answer
from vllm_zo.entrypoints.llm.rollouts.gate import RolloutGate
from vllm_zo.entrypoints.llm.rollouts.opened import OpenedRollouts
from vllm_zo.entrypoints.llm.rollouts.pool import RolloutPool
from vllm_zo.entrypoints.llm.rollouts.transcripts import MAX_SAID, MAX_TEXT, Transcript, Transcripts
from vllm_zo.entrypoints.llm.rollouts.transcripts import ROWS as KEPT_ROWS
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.records import best, evaluations_since_best
from vllm_zo.jobs.status import JobStatus
from vllm_zo.objectives import EncodedExample

NAN = math.nan
ROWS = 3


def play(client: Any, model: str, row: dict[str, Any]) -> float:
    return 0.0


# --- the objective ----------------------------------------------------------------------------------------------------


def test_a_row_that_is_dropped_tells_no_probe_from_another() -> None:
    rewards = torch.tensor([[1.0, NAN, 0.0], [0.0, NAN, 0.5]])
    examples = [Rollout(play).encode({"n": n}, None, "") for n in range(3)]
    for shaping in ("none", "baseline", "zscore", "rank"):
        losses, predictions = Rollout(play, shaping=shaping).loss(rewards, examples)
        assert losses[:, 1].tolist() == [0.0, 0.0] and torch.isfinite(losses).all()
        assert losses[0, 0] < losses[1, 0] and losses[0, 2] > losses[1, 2], "a higher reward is a lower loss"
        assert predictions.tolist() == [[0, 1, 1], [1, 1, 1]]
    losses, _ = Rollout(play, shaping="zscore").loss(rewards[:1], examples)
    assert losses[0, 0] == -1.0 and losses[0, 1].isnan(), "an evaluation keeps its rewards, and shows what is missing"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"play": 3}, r"play=3: expected a function play\(client, model, row\)"),
        ({"play": "os.path:join.x"}, "play='os.path:join.x': expected 'module:function'"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"on_failure": "retry"}, "on_failure 'retry'"),
        ({"shaping": "max"}, "shaping 'max'"),
        ({"server": ["chat_template"]}, "server=.*expected a mapping"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rollout(**{"play": play, **settings})


def test_a_job_with_rollouts_crosses_processes_as_json() -> None:
    config = JobConfig(objective=Rollout(play, server={"chat_template": "{{ messages }}"}), learning_rate=1e-2)
    again = JobConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config and str(again.objective.play).endswith("test_rollout:play")
    assert again.objective.function() is play
    with pytest.raises(ConfigError, match="play='no_such_module:f' cannot be imported"):
        Rollout("no_such_module:f").function()
    with pytest.raises(ConfigError, match="expected a function"):
        Rollout("math:pi").function()


def test_pass_at_k_counts_the_rows_that_one_of_k_rollouts_passes() -> None:
    objective = Rollout(play, eval_samples=3, pass_reward=1.0)
    rows = [objective.evaluated(objective.encode({"n": n}, None, "")) for n in range(3)]
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.5, 0.1, 0.0, 0.0, 1.5]])
    losses, predictions = objective.loss(rewards, rows)
    assert losses[0].tolist() == pytest.approx([-2 / 3, -0.2, -0.5]) and predictions.tolist() == [[1, 3, 2]]
    metrics = objective.metrics(losses[0].tolist(), predictions[0].tolist(), rows)
    assert metrics["accuracy"] == pytest.approx(3 / 9), "pass@1"
    assert metrics["pass_at_3"] == pytest.approx(2 / 3) and metrics["reward"] == pytest.approx((2 / 3 + 0.2 + 0.5) / 3)
    losses, _ = objective.loss(rewards.masked_fill(torch.arange(9) == 4, NAN), rows)
    assert [math.isnan(loss) for loss in losses[0]] == [False, True, False], "one that failed drops its row"
    assert "pass_at_1" not in Rollout(play).metrics([-1.0], [0], [Rollout(play).encode({}, None, "")])


def test_a_state_under_which_hard_rows_fail_is_not_the_best() -> None:
    def evaluation(step: int, loss: float, dropped: int, lowest: float) -> Any:
        return {"step": step, "eval_loss": loss, "eval_rows": 10, "eval_dropped": dropped, "eval_lowest_reward": lowest}

    base, fails, better = evaluation(0, -0.5, 0, 0.0), evaluation(1, -0.9, 5, 0.8), evaluation(2, -0.6, 0, 0.0)
    assert best([base, fails]) is base, "five rows at .9 and five that count 0 are .45"
    assert best([base, fails, better]) is better
    unlucky = evaluation(3, -0.8, 1, 0.0)
    assert best([base, better, unlucky]) is unlucky, "a tool that was down once does not cost the state its place"
    assert evaluations_since_best([base, fails]) == 1, "what `patience` looks at"


# --- the group --------------------------------------------------------------------------------------------------------


def make(tmp_path: Path, slots: int = 4, validation: int = 0, **settings: Any) -> tuple[Controller, Job, Recorder]:
    objective = Rollout(play, **settings)
    train, held_out = ([objective.encode({"n": n}, None, "") for n in range(rows)] for rows in (ROWS, validation))
    config = JobConfig(
        learning_rate=1e-2, objective=objective, steps=5, batch_size=ROWS, update_space="bank",
        method=EGGROLL(queries=2, interval=5),
    )  # fmt: skip
    controller, recorder = Controller(slots_per_job=slots, block_size=16), Recorder()
    directory = JobDir(tmp_path / "job")
    directory.path.mkdir()
    for path, rows in ((directory.train, train), (directory.validation, held_out)):
        path.write_bytes(b"".join(msgspec.json.encode(example) + b"\n" for example in rows))
    job = Job(
        directory, config, num_bases=1, eval_batch=8, recorder=recorder,  # type: ignore[arg-type]
        start=StartJob("job", 0, config.method, objective, "bank", 1, "all-linear"),
    )  # fmt: skip
    controller.add_job(job)
    return controller, job, recorder


def step(controller: Controller) -> list[Any]:
    """One engine step; the commands that precede its forward."""
    assert controller.offer(PLENTY, in_chunks_beyond=UNLIMITED, serving=False) == [], "the engine runs no rollouts"
    commands = controller.take_commands()
    assert not commands.members and not commands.alone
    return commands.before


def answers(rollouts: list[dict[str, Any]], reward: Any = None, error: str = "") -> list[Answer]:
    return [
        Answer(
            r["group"], r["probe"], r["sequence"], r["probe"] + r["example"] / 10 if reward is None else reward, error
        )
        for r in rollouts
    ]


def test_a_group_closes_with_the_rewards_once_every_rollout_has_one(tmp_path: Path) -> None:
    controller, job, recorder = make(tmp_path)
    assert controller.exchange_rollouts("job", []) == {"group": None, "rollouts": []}
    opened = step(controller)
    assert sum(isinstance(c, Materialise) for c in opened) == 4
    handed = controller.exchange_rollouts("job", [])
    rollouts = handed["rollouts"]
    assert [(r["probe"], r["sequence"]) for r in rollouts] == [(p, s) for p in range(4) for s in range(ROWS)]
    assert {r["model"] for r in rollouts} == {f"probe:job/0/{p}" for p in range(4)}
    seeds = [[r["seed"] for r in rollouts if r["probe"] == p] for p in range(4)]
    assert seeds[0] == seeds[1] == seeds[3] and len(set(seeds[0])) == ROWS, "common random numbers"
    assert controller.exchange_rollouts("job", [])["rollouts"] == [], "none is handed out twice"
    step(controller)
    first, last = answers(rollouts)[:-1], answers(rollouts)[-1]
    controller.exchange_rollouts("job", first)
    controller.exchange_rollouts("job", [first[0], Answer(first[0].group_id, 0, 0, 99.0)])  # again, and otherwise
    assert not any(isinstance(c, CloseGroup) for c in step(controller))
    controller.exchange_rollouts("job", [Answer("zo-job-77", 3, ROWS - 1, 5.0), last])
    commands = step(controller)
    closing = next(c for c in commands if isinstance(c, CloseGroup))
    order = [type(c) for c in commands]
    assert order.index(CloseGroup) < order.index(OpenGroup) < order.index(Materialise)
    ids = [r["example"] for r in rollouts[:ROWS]]
    assert closing.cells == tuple(tuple(p + i / 10 for i in ids) for p in range(4))
    losses = [[-9.0] * ROWS] * 4  # shaped, as the worker applies them
    controller.on_results(ZOResults(groups=[GroupResult(closing.group_id, losses, [[1] * ROWS] * 4, [0.5, 0.5], True)]))
    (record,) = recorder.records
    assert record["rewards"] == pytest.approx([0.1, 1.1, 2.1, 3.1]) and record["reward"] == pytest.approx(1.6)
    assert record["dropped"] == 0 and job.recorded == 1


def test_more_probes_than_slots_play_in_waves_and_a_probe_answers_in_its_own(tmp_path: Path) -> None:
    controller, _, _ = make(tmp_path, slots=2)
    step(controller)
    first = controller.exchange_rollouts("job", [])["rollouts"]
    assert {r["probe"] for r in first} == {0, 1}
    group, slot = controller.find_probe(first[0]["path"])
    assert group.group_id == first[0]["group"] and slot == 0
    with pytest.raises(ConfigError, match="answers no more"):
        controller.find_probe(first[0]["path"][:-1] + "2")
    controller.exchange_rollouts("job", answers(first))
    with pytest.raises(ConfigError, match="its group has closed"):
        controller.find_probe(first[0]["path"])
    step(controller)
    second = controller.exchange_rollouts("job", [])["rollouts"]
    assert {r["probe"] for r in second} == {2, 3} and second[0]["group"] == first[0]["group"]
    assert controller.find_probe(second[0]["path"])[1] == 0
    controller.exchange_rollouts("job", answers(second))
    assert any(isinstance(c, CloseGroup) for c in step(controller))


def test_a_dropped_step_is_taken_again_with_the_same_seeds_and_old_answers_count_for_nothing(tmp_path: Path) -> None:
    controller, _, _ = make(tmp_path)
    step(controller)
    first = controller.exchange_rollouts("job", [])["rollouts"]
    controller.exchange_rollouts("job", answers(first[:5]))
    controller.drop_groups()
    assert controller.exchange_rollouts("job", answers(first[5:])) == {"group": None, "rollouts": []}
    step(controller)
    again = controller.exchange_rollouts("job", answers(first))["rollouts"]
    assert [(r["seed"], r["model"], r["example"]) for r in again] == [
        (r["seed"], r["model"], r["example"]) for r in first
    ]
    assert {r["path"] for r in again}.isdisjoint(r["path"] for r in first), "cached blocks go by the path"
    controller.exchange_rollouts("job", answers(again[1:]))
    assert not any(isinstance(c, CloseGroup) for c in step(controller))


def test_what_a_failed_rollout_counts(tmp_path: Path) -> None:
    for settings, expected in (({}, NAN), ({"on_failure": "floor", "floor": -2.0}, -2.0)):
        folder = tmp_path / str(expected)
        folder.mkdir()
        controller, _, recorder = make(folder, **settings)
        step(controller)
        rollouts = controller.exchange_rollouts("job", [])["rollouts"]
        failed, *others = rollouts
        bad = answers([failed], error="it broke") if expected == -2.0 else answers([failed], reward=NAN)
        controller.exchange_rollouts("job", bad + answers(others))
        closing = next(c for c in step(controller) if isinstance(c, CloseGroup))
        column = [row[0] for row in closing.cells or ()]
        assert column[0] == expected or all(map(math.isnan, column))
        assert not any(math.isnan(reward) for row in closing.cells or () for reward in row[1:])
        result = GroupResult(closing.group_id, [[0.0] * ROWS] * 4, [[0] * ROWS] * 4, [0.5, 0.5], True)
        controller.on_results(ZOResults(groups=[result]))
        (record,) = recorder.records
        assert record["dropped"] == int(math.isnan(expected)) and math.isfinite(record["reward"])


@pytest.mark.parametrize(("on_failure", "of", "message"), [
    ("fail", 1, "a rollout failed, and on_failure='fail': it broke"),
    ("drop", 12, "every row of the step was dropped.*12 of 12 did, the last one so: it broke"),
])  # fmt: skip
def test_failures_that_fail_the_job_free_its_slots(tmp_path: Path, on_failure: str, of: int, message: str) -> None:
    controller, job, _ = make(tmp_path, on_failure=on_failure)
    step(controller)
    rollouts = controller.exchange_rollouts("job", [])["rollouts"]
    controller.exchange_rollouts("job", answers(rollouts[:of], error="it broke"))
    with pytest.raises(ConfigError):
        controller.find_probe(rollouts[-1]["path"])
    step(controller)
    assert job.status == JobStatus.FAILED and job.recorded == 0
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(job.summary()["error"])
    (lane,) = controller.queue.lanes
    assert lane.job is None and len(lane.slots.free) == 4
    assert controller.exchange_rollouts("job", [])["group"] is None


def test_an_evaluation_plays_a_row_several_times_with_seeds_of_its_own(tmp_path: Path) -> None:
    controller, _, recorder = make(tmp_path, validation=2, eval_samples=2)
    step(controller)
    rollouts = controller.exchange_rollouts("job", [])["rollouts"]
    assert [(r["example"], r["sample"]) for r in rollouts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({r["seed"] for r in rollouts}) == 4 and not any(r["trains"] for r in rollouts)
    first, *others = answers(rollouts, reward=0.5)
    controller.exchange_rollouts("job", [replace(first, error="it broke"), *others])
    closing = next(c for c in step(controller) if isinstance(c, CloseGroup))
    assert [math.isnan(reward) for reward in (closing.cells or ((),))[0]] == [True, True, False, False]
    result = GroupResult(closing.group_id, [[NAN, -0.5]], [[2, 2]], [], True)
    controller.on_results(ZOResults(groups=[result]))
    (record,) = recorder.records
    assert record["eval_rows"] == 2 and record["eval_dropped"] == 1 and record["eval_lowest_reward"] == 0.5
    assert record["eval_reward"] == 0.5 and record["eval_pass_at_2"] == record["eval_accuracy"] == 0.0


# --- the pool ---------------------------------------------------------------------------------------------------------


def described(sequence: int, probe: int = 0, group: str = "g") -> dict[str, Any]:
    return {
        "group": group, "probe": probe, "sequence": sequence, "model": f"probe:job/0/{probe}", "path": f"p/{probe}",
        "trains": True, "step": 0, "example": sequence, "sample": 0, "seed": sequence,
    }  # fmt: skip


def pool_of(play_one: Any, rows: int, **settings: Any) -> tuple[RolloutPool, OpenedRollouts]:
    opened = OpenedRollouts()
    train = [EncodedExample((), columns={"n": n}) for n in range(rows)]
    transcripts = Transcripts(JobDir(Path("/nowhere")))  # rollouts that train have none
    return RolloutPool(Rollout(play, **settings), play_one, opened, train, [], transcripts, lambda: None), opened


async def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def test_a_thousand_rollouts_at_once_play_a_few_at_a_time() -> None:
    running, most = 0, 0

    async def one(rollout: Any, row: dict[str, Any]) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return float(row["n"])

    async def main() -> list[Any]:
        pool, opened = pool_of(one, 1000, concurrency=7)
        pool.take({"group": "g", "rollouts": [described(n) for n in range(1000)]})
        await until(lambda: not pool.playing)
        assert not opened._by_token
        return pool.take_answers()

    got = asyncio.run(main())
    assert most == 7 and sorted(got) == [("g", 0, n, float(n), "") for n in range(1000)]


def test_every_way_to_fail_fails_one_rollout() -> None:
    async def stubborn(seconds: float) -> float:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            await asyncio.sleep(seconds)
        return 1.0

    async def one(rollout: Any, row: dict[str, Any]) -> Any:
        kind = ("number", "text", "none", "raises", "slow", "stubborn", "nan")[row["n"]]
        if kind == "raises":
            raise KeyError("no such tool")
        if kind in ("slow", "stubborn"):
            return await (asyncio.sleep(30) if kind == "slow" else stubborn(30))
        return {"number": True, "text": "0.5", "none": None, "nan": NAN}[kind]

    async def main() -> dict[int, Any]:
        pool, _ = pool_of(one, 7, timeout_s=0.2)
        pool.take({"group": "g", "rollouts": [described(n) for n in range(7)]})
        await until(lambda: not pool.playing)
        return {answer[2]: answer[3:] for answer in pool.take_answers()}

    started = time.monotonic()
    got = asyncio.run(_without_waiting(main()))
    assert time.monotonic() - started < 15
    assert got[0] == (1.0, "") and math.isnan(got[6][0]) and got[6][1] == ""
    errors = [got[n][1] for n in (1, 2, 3, 4, 5)]
    assert all(got[n][0] is None for n in (1, 2, 3, 4, 5))
    assert "play returned '0.5': expected a number" in errors[0] and "play returned None" in errors[1]
    assert errors[2] == "KeyError: 'no such tool'"
    assert errors[3] == errors[4] == "it took longer than timeout_s=0.2"


async def _without_waiting(main: Any) -> Any:
    """The result of `main`; what still runs is cancelled twice, as a program that puts its end off needs it."""
    result = await main
    for _ in range(2):
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.01)
    return result


def test_a_group_that_is_gone_takes_its_rollouts_with_it() -> None:
    async def one(rollout: Any, row: dict[str, Any]) -> float:
        await asyncio.sleep(0 if rollout.path == "p/1" else 30)
        return 1.0

    async def main() -> list[Any]:
        pool, opened = pool_of(one, 2)
        pool.take({"group": "g", "rollouts": [described(0), described(1)]})
        await until(lambda: len(opened._by_token) == 2)
        pool.take({"group": "h", "rollouts": [described(0, probe=1, group="h")]})
        await until(lambda: not pool.playing)
        assert not opened._by_token
        return pool.take_answers()

    assert asyncio.run(main()) == [("h", 0 + 1, 0, 1.0, "")]


# --- the addresses ----------------------------------------------------------------------------------------------------


def test_an_address_leads_to_its_probe_with_a_seed_for_every_turn() -> None:
    inner, seen = FastAPI(), []

    @inner.post("/v1/{path:path}")
    async def echo(path: str, request: Request) -> Any:
        seen.append((path, await request.json()))
        return {"path": path}

    opened = OpenedRollouts()
    client = TestClient(RolloutGate(inner, opened))
    one, other = opened.open(described(4, probe=0)), opened.open(described(4, probe=1))
    for rollout in (one, other):
        for body in ({"model": rollout.model}, {"prompt": "p"}, {"model": "base", "seed": 7}, {"model": rollout.model}):
            assert client.post(f"{rollout.address}/chat/completions", json=body).json() == {"path": "chat/completions"}
    bodies = [body for _, body in seen]
    seeds = [body["seed"] for body in bodies]
    assert seeds[:4] == seeds[4:] and seeds[2] == 7 and len(set(seeds)) == 4, "one a turn, the same for all probes"
    assert bodies[1]["model"] == "probe:job/0/0" and bodies[5]["model"] == "probe:job/0/1", "never the base by mistake"
    assert bodies[2]["model"] == "base", "a judge"
    wrong = client.post(f"{one.address}/completions", json={"model": other.model})
    assert wrong.status_code == 404 and "is 'probe:job/0/0', not 'probe:job/0/1'" in wrong.json()["error"]["message"]
    assert client.post("/v1/completions", json={"model": "base"}).status_code == 200
    assert "seed" not in seen[-1][1], "other paths pass unchanged"
    files = client.post(f"{one.address}/files", json={})
    assert files.status_code == 404 and "only asks models" in files.json()["error"]["message"]
    opened.close(one)
    late = client.post(f"{one.address}/completions", json={"model": one.model})
    assert late.status_code == 404 and "This rollout has ended" in late.json()["error"]["message"]
    assert SimpleNamespace(**late.json()["error"]).code == 404


# --- transcripts ------------------------------------------------------------------------------------------------------


def said(transcript: Transcript) -> list[tuple[str, str]]:
    return [(one["role"], one["text"]) for one in transcript.said]


def test_a_transcript_has_every_message_once_and_the_calls_of_tools() -> None:
    transcript = Transcript()
    chat: list[Any] = [{"role": "system", "content": "Guess."}, {"role": "user", "content": [{"text": "a film"}]}]
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    transcript.turn({"messages": list(chat)}, json.dumps({"choices": [{"message": answer}]}).encode())
    chat += [answer, {"role": "tool", "content": "it is good"}]
    parts = [{"choices": [{"delta": {"content": piece}}]} for piece in ("go", "od")]
    stream = b"".join(b"data: " + json.dumps(part).encode() + b"\n\n" for part in parts) + b"data: [DONE]\n\n"
    transcript.turn({"messages": list(chat)}, stream)
    assert said(transcript) == [
        ("system", "Guess."), ("user", "a film"), ("assistant", 'look: {"at": 1}'), ("tool", "it is good"),
        ("assistant", "good"),
    ]  # fmt: skip
    transcript.begin()
    transcript.turn({"prompt": "a"}, b'{"choices": [{"text": "b"}]}')
    transcript.turn({"prompt": [1, 2]}, b'{"error": {"message": "too long"}}')
    transcript.turn({"prompt": None}, b'{"choices": [{"te')
    assert said(transcript)[:4] == [("prompt", "a"), ("assistant", "b"), ("prompt", "[1, 2]"),
                                    ("assistant", "[error: too long]")]  # fmt: skip
    assert said(transcript)[5] == ("assistant", "[an answer that was cut off]")


def test_transcripts_are_bounded_and_keep_base_and_newest(tmp_path: Path) -> None:
    directory = JobDir(tmp_path)

    async def evaluation(transcripts: Transcripts, step: int) -> None:
        for row in range(KEPT_ROWS + 2):
            for sample in (0, 1):
                one = {**described(row), "trains": False, "step": step, "sample": sample}
                if (transcript := transcripts.of(one)) is not None:
                    for _ in range(50):
                        transcript.turn({"prompt": f"step {step}" + "x" * 5000}, b'{"choices": [{"text": "y"}]}')
                    await transcripts.keep(one, transcript, 0.5, "")

    async def main() -> None:
        transcripts = Transcripts(directory)
        assert transcripts.of(described(0)) is None, "rollouts that train"
        for step in (0, 10):
            await evaluation(transcripts, step)
        await evaluation(Transcripts(directory), 20)  # a server that was started again

    asyncio.run(main())
    found = directory.read_transcripts()
    assert {name: part["step"] for name, part in found.items()} == {"base": 0, "newest": 20}
    assert all([one["row"] for one in part["rollouts"]] == list(range(KEPT_ROWS)) for part in found.values())
    texts = [one["text"] for one in found["newest"]["rollouts"][0]["said"]]
    assert sum(map(len, texts)) <= MAX_SAID + 100 and len(texts[0]) < MAX_TEXT + 50 and texts[0].startswith("step 20")
    assert "not kept" in texts[-1]
