"""How the engine is shared between jobs, without an engine."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from vllm_zo.engine.lane import by_need, enter, make_lanes


def job(name: str) -> Any:
    return SimpleNamespace(job_id=name)


def test_lanes_share_out_the_slots_and_none_twice() -> None:
    lanes = make_lanes(3, slots_per_lane=4, block_size=16)
    assert [lane.slots.free for lane in lanes] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_jobs_beyond_the_lanes_do_not_enter() -> None:
    lanes = make_lanes(2, slots_per_lane=2, block_size=16)
    assert enter(lanes, job("a")) and enter(lanes, job("b")) and not enter(lanes, job("c"))
    lanes[0].leave()
    assert enter(lanes, job("c")) and [lane.job.job_id for lane in lanes if lane.job] == ["c", "b"]


def test_tokens_are_shared_evenly_whatever_a_job_asks_for() -> None:
    """Groups of very different sizes: over time each lane is given the same, to within its largest group."""
    rng = random.Random(0)
    lanes = make_lanes(3, slots_per_lane=2, block_size=16)
    sizes = {"small": 10, "middle": 100, "large": 1000}
    for name in sizes:
        enter(lanes, job(name))
    for _ in range(3000):
        first = by_need(lanes)[0]  # one group fits a step
        first.tokens += rng.randint(1, sizes[first.job.job_id])
    assert max(lane.tokens for lane in lanes) - min(lane.tokens for lane in lanes) <= 1000


def test_a_job_that_enters_is_not_owed_the_time_before() -> None:
    lanes = make_lanes(2, slots_per_lane=2, block_size=16)
    enter(lanes, job("old"))
    lanes[0].tokens = 5000
    enter(lanes, job("new"))
    turns = []
    for _ in range(6):
        first = by_need(lanes)[0]
        turns.append(first.job.job_id)
        first.tokens += 100
    assert turns == ["old", "new"] * 3, "they take turns from the start"
