"""A group that generates, as the controller sees it: no engine, members are "run" by the test."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vllm_zo import JobConfig, LoZO, Reward, RewardError
from vllm_zo.commands import CloseGroup, GroupResult, Materialise, OpenGroup, StartJob, ZOCommands, ZOResults
from vllm_zo.engine.admission import UNLIMITED, Capacity
from vllm_zo.engine.controller import Controller
from vllm_zo.engine.group import Member
from vllm_zo.engine.job import Job
from vllm_zo.engine.rewarder import Rewarder, Scoring
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.status import JobStatus
from vllm_zo.objectives.base import EncodedExample, Generation, ScoringSequence

PLENTY = Capacity(sequences=1000, tokens=10_000, kv_blocks=1000)
ROWS = 3


class Recorder:
    """Keeps in memory what the real one writes to disk."""

    waiting = False
    error = None

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.steps: list[Any] = []

    def metrics(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def step(self, *step: Any) -> None:
        self.steps.append(step)

    def retry(self) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...
    def forget(self) -> None: ...
    def summarise(self, summary: dict[str, Any]) -> None: ...


def make(tmp_path: Path, reward: Any, samples: int = 1, **options: Any) -> tuple[Controller, Job, Recorder]:
    objective = Reward("{q}", reward=reward, samples=samples, **options)
    row = ScoringSequence((1, 2, 3), (), (), "generate", Generation(4, 1.0, 1.0, (2,)))
    train = [EncodedExample((row,) * samples, columns={"i": i, "prompts": f"p{i}"}) for i in range(ROWS)]
    config = JobConfig(learning_rate=1e-7, objective=objective, method=LoZO(interval=1), steps=5, batch_size=ROWS)
    controller, recorder = Controller(slots_per_job=2, block_size=16), Recorder()
    directory = JobDir(tmp_path / "job")
    directory.path.mkdir()
    directory.train.write_bytes(b"".join(msgspec.json.encode(example) + b"\n" for example in train))
    directory.validation.touch()
    job = Job(
        directory, config, num_bases=5, eval_batch=8,
        start=StartJob("job", 0, config.method, objective, "bank", 5, "all-linear"),
        recorder=recorder,  # type: ignore[arg-type]
        rewarder=Rewarder(objective, lambda continued, completion: "".join(map(chr, completion))),
    )  # fmt: skip
    controller.add_job(job)
    return controller, job, recorder


def generate(controller: Controller, members: list[Member]) -> None:
    """Two engine steps: every member writes its probe's letter, then its row's, and ends."""
    for member in members:
        controller.score(member, 0, 3, last_chunk=True)
        controller.generated(member, [ord("a") + member.probe], finished=False)
    for member in members:
        controller.generated(member, [ord("A") + member.sequence], finished=True)


def until_closed(controller: Controller) -> ZOCommands:
    """Commands of the step that closes the group."""
    for _ in range(1000):
        controller.offer(PLENTY, in_chunks_beyond=UNLIMITED, serving=False)
        commands = controller.take_commands()
        if any(isinstance(c, CloseGroup) for c in commands.before):
            return commands
        controller.wait_idle(0.01)
    raise AssertionError("the group never closed")


def test_rewards_close_the_group_before_anything_of_the_next_is_written(tmp_path: Path) -> None:
    calls = []

    def reward(completions: list[str], i: list[int]) -> list[float]:
        calls.append((completions, i))
        return [ord(text[0]) - ord("a") + index / 10 for text, index in zip(completions, i, strict=True)]

    controller, job, recorder = make(tmp_path, reward)
    members = controller.offer(PLENTY, in_chunks_beyond=UNLIMITED, serving=False)
    assert [(m.probe, m.sequence) for m in members] == [(p, r) for p in (0, 1) for r in range(ROWS)]
    seeds = [m.sampling_seed for m in members]
    assert seeds[:ROWS] == seeds[ROWS:], "common random numbers"
    assert len(set(seeds)) == ROWS and all(0 <= seed < 2**63 for seed in seeds)
    opened = controller.take_commands()
    assert all(e.columns is None for c in opened.before if isinstance(c, OpenGroup) for e in c.examples)
    generate(controller, members)
    running = controller.take_commands()
    assert running.generates and not running.members and not running.after
    commands = until_closed(controller)
    ids = calls[0][1]
    assert calls == [(["aA", "aB", "aC", "bA", "bB", "bC"], ids)] and ids[:ROWS] == ids[ROWS:]
    closing = next(c for c in commands.before if isinstance(c, CloseGroup))
    order = [type(c) for c in commands.before]
    assert order.index(CloseGroup) < order.index(OpenGroup) < order.index(Materialise)
    assert closing.cells == (tuple(i / 10 for i in ids[:3]), tuple(1 + i / 10 for i in ids[:3]))
    losses = [[-7.0] * 3, [7.0] * 3]  # shaped, as the worker applies them
    controller.on_results(ZOResults(groups=[GroupResult(closing.group_id, losses, [[1] * 3] * 2, [0.5], True)]))
    (record,) = recorder.records
    assert record["loss_plus"] == pytest.approx(-0.1) and record["loss_minus"] == pytest.approx(-1.1)
    assert record["reward"] == pytest.approx(0.6) and recorder.steps == [(0, 1e-7, [0.5], True, None)]
    assert job.stats()["tokens"] == 2 * ROWS * 2 + 2 * ROWS * 3, "prompts and completions of every probe"


def test_samples_of_a_prompt_have_their_own_seeds_and_share_its_columns(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(completions: list[str], prompts: list[str]) -> list[float]:
        seen.append(prompts)
        return [0.0] * len(completions)

    controller, _, _ = make(tmp_path, reward, samples=2)
    members = controller.offer(PLENTY, in_chunks_beyond=UNLIMITED, serving=False)
    assert len({m.sampling_seed for m in members}) == 2 * ROWS and len(members) == 4 * ROWS
    controller.take_commands()
    generate(controller, members)
    until_closed(controller)
    assert seen[0][0::2] == seen[0][1::2] and len(set(seen[0])) == ROWS


def test_a_reward_that_fails_ends_its_job_and_frees_its_slots(tmp_path: Path) -> None:
    controller, job, _ = make(tmp_path, lambda completions: [0.0])
    members = controller.offer(PLENTY, in_chunks_beyond=UNLIMITED, serving=False)
    controller.take_commands()
    generate(controller, members)
    for _ in range(1000):
        controller.wait_idle(0.01)
        controller.offer(PLENTY, in_chunks_beyond=UNLIMITED, serving=False)
        if job.status == JobStatus.FAILED:
            break
    assert job.status == JobStatus.FAILED and "returned 1 numbers for 6 completions" in str(job.summary()["error"])
    assert job.recorded == 0
    (lane,) = controller.queue.lanes
    assert lane.job is None and lane.slots.free == [0, 1]


def test_an_open_group_that_is_dropped_forgets_its_rewards_and_runs_again(tmp_path: Path) -> None:
    release = threading.Event()

    def reward(completions: list[str]) -> list[float]:
        assert release.wait(10)
        return [0.0] * len(completions)

    controller, _, _ = make(tmp_path, reward)
    first = controller.offer(PLENTY, in_chunks_beyond=UNLIMITED, serving=False)
    controller.take_commands()
    generate(controller, first)
    controller.drop_groups()
    release.set()
    again = controller.offer(PLENTY, in_chunks_beyond=UNLIMITED, serving=False)
    assert [m.sampling_seed for m in again] == [m.sampling_seed for m in first]
    assert again[0].group is not first[0].group and again[0].req_id != first[0].req_id
    assert not any(isinstance(c, CloseGroup) for c in controller.take_commands().before)
    generate(controller, again)
    until_closed(controller)


def test_a_reward_that_never_returns_is_given_up() -> None:
    never = threading.Event()
    scoring = Scoring(lambda: (never.wait(30) and ()) or (), timeout_s=0.5)
    begun = time.monotonic()
    with pytest.raises(RewardError, match="did not answer within timeout_s=0.5"):
        while scoring.outcome() is None:
            scoring.wait(0.01)
    assert time.monotonic() - begun > 0.4
    never.set()


def test_what_is_not_a_reward_error_is_told_as_one() -> None:
    def tokenizer_is_gone(continued: Any, completion: Any) -> str:
        raise OSError("no tokenizer")

    rewarder = Rewarder(Reward("{q}", reward="contains"), tokenizer_is_gone)
    row = ScoringSequence((1,), (), (), "generate", Generation(1, 1.0, 1.0, ()))
    scoring = rewarder.start([EncodedExample((row,))], [[1]])
    scoring.wait(5)
    with pytest.raises(RewardError, match="OSError: no tokenizer"):
        scoring.outcome()
