"""Scheduling decisions without an engine."""

from __future__ import annotations

import random

import pytest

from vllm_zo.engine.admission import Capacity, Demand, Unit, admit, capacity_for_training, plan_waves
from vllm_zo.engine.group import PerturbationGroup
from vllm_zo.engine.slot_table import SlotTable
from vllm_zo.errors import ConfigError, SlotError
from vllm_zo.methods.base import Probe, ProbePlan
from vllm_zo.objectives.base import EncodedExample, ScoringRow

PLENTY = Capacity(sequences=1000, tokens=100_000, kv_blocks=10_000)
PAIR = Unit(members=2, tokens=20, kv_blocks=2)


def pairs(count: int) -> tuple[Probe, ...]:
    return tuple(Probe(seed, sign, 1e-3) for seed in range(count) for sign in (1, -1))


def example(length: int) -> EncodedExample:
    return EncodedExample((ScoringRow(tuple(range(length)), (length - 1,), (0, 1), "labels"),))


def group(directions: int, rows: int, slots: int) -> PerturbationGroup:
    plan = ProbePlan(0, pairs(directions), 0)
    return PerturbationGroup("g", "j", plan, tuple(example(5 + i) for i in range(rows)), 0.1, slots, block_size=16)


@pytest.mark.parametrize("slots", [2, 3, 4, 5, 8, 100])
@pytest.mark.parametrize("directions", [1, 2, 5])
def test_a_wave_never_separates_the_signs_of_a_direction(directions: int, slots: int) -> None:
    probes = pairs(directions)
    waves = plan_waves(probes, slots)
    assert sorted(i for wave in waves for i in wave) == list(range(len(probes)))
    for wave in waves:
        assert len(wave) <= slots
        seeds = [probes[i].seed for i in wave]
        assert all(seeds.count(seed) == 2 for seed in seeds)


def test_a_pair_that_fits_no_wave_is_refused() -> None:
    with pytest.raises(ConfigError, match="slots=1"):
        plan_waves(pairs(1), slots=1)


def test_serving_comes_first_and_training_keeps_to_its_budget_beside_it() -> None:
    total = Capacity(sequences=10, tokens=100, kv_blocks=50)
    assert capacity_for_training(total, Demand(), token_budget=8) == total  # the budget is for steps that serve
    beside = capacity_for_training(total, Demand(requests=3, tokens=30, kv_blocks=5, waiting=2), token_budget=40)
    assert beside == Capacity(sequences=8, tokens=40, kv_blocks=45)
    flooded = capacity_for_training(total, Demand(requests=300, tokens=3000, kv_blocks=500, waiting=290), None)
    assert flooded == Capacity(0, 0, 0)


@pytest.mark.parametrize("limit", ["sequences", "tokens", "kv_blocks"])
def test_units_start_whole_or_not_at_all(limit: str) -> None:
    unit_cost = {"sequences": 2, "tokens": 20, "kv_blocks": 2}[limit]
    for fits in range(5):
        for slack in range(unit_cost):
            capacity = Capacity(**{**vars(PLENTY), limit: fits * unit_cost + slack})
            assert admit([PAIR] * 4, capacity, engine_is_empty=False) == min(fits, 4)


def test_a_unit_too_long_for_any_step_starts_alone_on_an_empty_engine_only() -> None:
    long = Unit(members=2, tokens=500, kv_blocks=4)
    capacity = Capacity(sequences=8, tokens=100, kv_blocks=8)
    assert admit([long, PAIR], capacity, engine_is_empty=False) == 0
    assert admit([long, PAIR], capacity, engine_is_empty=True) == 1
    assert admit([long], Capacity(sequences=8, tokens=100, kv_blocks=3), engine_is_empty=True) == 0


def test_a_group_closes_when_its_last_member_is_scheduled_whatever_the_order() -> None:
    rng = random.Random(0)
    g = group(directions=3, rows=4, slots=2)
    seen = set()
    while not g.done:
        placement = g.open_wave([0, 1])
        assert set(placement.values()) == {0, 1}
        while not g.wave_done:
            _, units = g.units()
            unit = rng.choice(units)
            assert len({member.row for member in unit}) == 1
            g.start(unit)
            for member in unit:
                if rng.random() < 0.3:  # not scheduled after all
                    g.put_back(member)
                else:
                    g.finish(member)
                    seen.add((member.probe, member.row))
    assert seen == {(p, r) for p in range(6) for r in range(4)}


def test_a_member_counts_once() -> None:
    g = group(directions=1, rows=1, slots=2)
    g.open_wave([0, 1])
    _, ((plus, minus),) = g.units()
    g.start([plus, minus])
    g.finish(plus)
    with pytest.raises(AssertionError):
        g.finish(plus)
    assert not g.done
    g.finish(minus)
    assert g.done


def test_a_slot_is_not_given_away_while_a_member_refers_to_it() -> None:
    table = SlotTable(range(2))
    table.acquire(0, "a", pins=1)
    with pytest.raises(SlotError, match="held by a"):
        table.acquire(0, "b", pins=1)
    with pytest.raises(SlotError, match="1 members refer to it"):
        table.release("a")
    table.unpin(0)
    table.release("a")
    table.acquire(0, "b", pins=1)
    assert table.free == [1]
    table.release("b", force=True)
    assert table.free == [0, 1]
