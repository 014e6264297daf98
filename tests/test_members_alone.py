"""Members that the workers run in a forward of their own, because nothing else is asked of the engine.

That their losses are those of members that are requests, bit for bit, is in tests/test_rows.py.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engines import SENTIMENT, Engines, members_as_requests, reviews, scheduler_of, worker_of
from tests.trajectories import steps_of
from vllm_zo import JobError, LoZO
from vllm_zo.commands import COMMANDS_ATTR, ZOCommands
from vllm_zo.doorbell import Doorbell
from vllm_zo.worker.cpu import pruned_forward

JOB: dict[str, Any] = {
    "objective": SENTIMENT, "method": LoZO(eps=2e-2, interval=3), "learning_rate": 1e-3, "batch_size": 8, "steps": 4,
    "progress": False,
}  # fmt: skip


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call with an engine: what its workers are told from then on, step by step."""

    def watch(llm: Any) -> list[ZOCommands]:
        told: list[ZOCommands] = []
        scheduler = scheduler_of(llm)
        schedule = scheduler.schedule

        def spy(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            if getattr(output, COMMANDS_ATTR, None):
                told.append(getattr(output, COMMANDS_ATTR))
            return output

        monkeypatch.setattr(scheduler, "schedule", spy)
        return told

    return watch


def losses(llm: Any, **options: Any) -> list[float]:
    return [record["loss"] for record in llm.finetune(reviews(16), **{**JOB, **options}).history]


def test_a_group_needs_neither_sequences_nor_kv_blocks(engines: Engines, commands: Any) -> None:
    llm = engines.get(max_num_seqs=4)
    told = commands(llm)
    manager = scheduler_of(llm).kv_cache_manager
    free = manager.block_pool.get_num_free_blocks()
    alone = losses(llm)
    steps = [step for step in told if step.members]
    assert [(bool(step.alone), len(step.members)) for step in steps] == [(True, 16)] * 4
    assert manager.block_pool.get_num_free_blocks() == free and not scheduler_of(llm).requests
    told.clear()
    with members_as_requests(llm):
        assert losses(llm) == pytest.approx(alone, abs=2e-5)  # four at a time, in products of other sizes
    assert len([step for step in told if step.members]) == 4 * 4 and not any(step.alone for step in told)


def test_members_are_requests_beside_a_request_and_alone_again_afterwards(engines: Engines, commands: Any) -> None:
    llm = engines.get()
    told = commands(llm)

    def ask(_: Any, record: dict[str, Any]) -> None:
        if record["step"] == 2:
            params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
            llm.llm_engine.add_request("beside", "one long string of cliches", params)

    losses(llm, steps=6, callbacks=[ask])
    assert [bool(step.alone) for step in told if step.members] == [True, True, False, False, True, True]


def test_a_forward_that_fails_fails_its_job_and_no_request(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without whole sequences to attend to, vLLM's attention would answer zeros: it has no metadata of this step."""
    llm = engines.get()
    plan_rows = pruned_forward.plan_rows
    monkeypatch.setattr(pruned_forward, "plan_rows", lambda *a: replace(plan_rows(*a), whole=None))
    with pytest.raises(JobError, match="RuntimeError: .*an attention call with further arguments"):
        losses(llm)
    monkeypatch.undo()
    assert llm.generate(["the story is"], SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].token_ids
    assert not worker_of(llm).zo.groups and losses(llm)


def test_a_slot_that_holds_nothing_is_an_error_never_zeros(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engines.get()
    pool = worker_of(llm).zo.pool
    materialise = pool.materialise

    def forgets(slot: int, *args: Any) -> None:
        materialise(slot, *args)
        if slot == 1:
            pool.evict(slot)

    monkeypatch.setattr(pool, "materialise", forgets)
    with pytest.raises(JobError, match="ZO slot 1 is not materialised"):
        losses(llm)


# --- a forward that stops for a request -------------------------------------------------------------------------------


@contextmanager
def requests_come(llm: Any, monkeypatch: pytest.MonkeyPatch, *, idle_only: bool) -> Iterator[list[int]]:
    """In the block a request comes in about every second layer of a forward of members alone.

    Yields the layers at which such forwards have stopped.
    """
    scheduler, zo = scheduler_of(llm), worker_of(llm).zo
    rng, number = random.Random(0), itertools.count()
    stops: list[int] = []
    answered = 0
    go_on, schedule = zo.go_on, scheduler.schedule

    def spy(*args: Any) -> None:
        go_on(*args)
        if zo._results.stopped_at is not None:
            stops.append(zo._results.stopped_at)

    def with_a_request(*args: Any, **kwargs: Any) -> Any:
        nonlocal answered
        if len(stops) > answered:
            answered = len(stops)
            params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
            llm.llm_engine.add_request(f"comes-{next(number)}", "the story is", params)
        return schedule(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(worker_of(llm), "_zo_listen", lambda path: lambda: rng.random() < 0.5)
        patch.setattr(scheduler, "_doorbell", Doorbell())
        patch.setattr(scheduler.zo_throttle, "_idle_only", idle_only)
        patch.setattr(zo, "go_on", spy)
        patch.setattr(scheduler, "schedule", with_a_request)
        yield stops
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()


@pytest.mark.parametrize("idle_only", [True, False], ids=["between requests", "beside them"])
@pytest.mark.parametrize(
    ("family", "options"),
    [("opt", {}), ("llama", {"target_modules": ".*", "bases": 2}), ("llama", {"target_layers": "last", "steps": 6})],
)
def test_a_forward_that_stopped_for_requests_takes_the_steps_of_one_that_did_not(
    engines: Engines,
    family: str,
    options: dict[str, Any],
    idle_only: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    llm = engines.get(family)
    alone = losses(llm, output_dir=str(tmp_path / "alone"), **options)
    with requests_come(llm, monkeypatch, idle_only=idle_only) as stops:
        assert losses(llm, output_dir=str(tmp_path / "stopped"), **options) == alone
    assert len(stops) > 3 and 1 in stops, "or this test shows nothing"
    assert steps_of(tmp_path / "alone") == steps_of(tmp_path / "stopped")
