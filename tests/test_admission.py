"""Scheduling decisions without an engine."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import example as instance
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_zo.engine.admission import (
    MAX_PASSES,
    UNLIMITED,
    Admission,
    Capacity,
    Credit,
    Demand,
    Unit,
    admit,
    capacity_for_training,
    plan_waves,
)
from vllm_zo.engine.group import PerturbationGroup, Work
from vllm_zo.engine.lane import make_lanes, start
from vllm_zo.engine.slot_table import SlotTable
from vllm_zo.errors import ConfigError, SlotError
from vllm_zo.methods.plan import Probe, ProbePlan
from vllm_zo.objectives.base import EncodedExample, Generation, ScoringSequence

PLENTY = Capacity(sequences=1000, tokens=100_000, kv_blocks=10_000)
PAIR = Unit(members=2, tokens=20, kv_blocks=2)


def pairs(count: int) -> tuple[Probe, ...]:
    return tuple(Probe(seed, sign, 1e-3) for seed in range(count) for sign in (1, -1))


def example(length: int) -> EncodedExample:
    return EncodedExample((ScoringSequence(tuple(range(length)), (length - 1,), (0, 1), "labels"),))


def group(directions: int, rows: int, slots: int) -> PerturbationGroup:
    return group_of([5 + i for i in range(rows)], SlotTable(range(slots)), directions)


def group_of(lengths: list[int], slots: SlotTable, directions: int = 1) -> PerturbationGroup:
    plan = ProbePlan(0, pairs(directions), 0)
    work = Work(plan, tuple(range(len(lengths))), tuple(map(example, lengths)), learning_rate=0.1)
    return PerturbationGroup("g", "j", work, slots, block_size=16)


@pytest.mark.parametrize("slots", [2, 3, 4, 5, 8, 100])
@pytest.mark.parametrize("directions", [1, 2, 5])
def test_a_wave_never_separates_the_signs_of_a_direction(directions: int, slots: int) -> None:
    probes = pairs(directions)
    waves = plan_waves(probes, slots)
    assert sorted(i for wave in waves for i in wave) == list(range(len(probes)))
    for wave in waves:
        assert len(wave) <= slots
        seeds = [probes[i].key for i in wave]
        assert all(seeds.count(seed) == 2 for seed in seeds)


def test_a_pair_that_fits_no_wave_is_refused() -> None:
    with pytest.raises(ConfigError, match="slots=1"):
        plan_waves(pairs(1), slots=1)


def test_serving_comes_first_and_training_keeps_to_its_credit_beside_it() -> None:
    total = Capacity(sequences=10, tokens=100, kv_blocks=50, credit=40)
    assert capacity_for_training(total, Demand()) == replace(total, credit=UNLIMITED)  # it counts in steps that serve
    beside = capacity_for_training(total, Demand(requests=3, tokens=30, kv_blocks=5, waiting=2))
    assert beside == Capacity(sequences=8, tokens=70, kv_blocks=45, credit=40)
    flooded = capacity_for_training(total, Demand(requests=300, tokens=3000, kv_blocks=500, waiting=290))
    assert flooded == Capacity(0, 0, 0, 40)


@pytest.mark.parametrize("limit", ["sequences", "tokens", "kv_blocks", "credit"])
def test_units_start_whole_or_not_at_all(limit: str) -> None:
    unit_cost = {"sequences": 2, "tokens": 20, "kv_blocks": 2, "credit": 25}[limit]
    unit = replace(PAIR, to_write=5)
    for fits in range(5):
        for slack in range(unit_cost):
            capacity = Capacity(**{**vars(PLENTY), limit: fits * unit_cost + slack})
            assert admit([unit] * 4, capacity).started == tuple(range(min(fits, 4)))


def test_a_unit_too_long_for_any_step_starts_in_chunks_once_no_member_has_tokens_left() -> None:
    long = Unit(members=2, tokens=500, kv_blocks=4)
    capacity = Capacity(sequences=8, tokens=100, kv_blocks=8)
    assert admit([long], capacity).started == ()
    assert admit([long, PAIR], capacity, in_chunks_beyond=100).started == (0,)
    assert admit([long], replace(capacity, kv_blocks=3), in_chunks_beyond=100).started == ()
    assert admit([long], replace(capacity, credit=499), in_chunks_beyond=100).started == ()
    assert admit([PAIR, long, PAIR], capacity, in_chunks_beyond=100).started == (0, 2), "only the first one"


def test_units_pass_one_that_waits_a_bounded_number_of_times() -> None:
    capacity, long, passes, passed = Capacity(100, 30, 100), Unit(2, 40, 1), 0, 0
    while (admission := admit([long, *[PAIR] * 9], capacity, passes=passes)).started:
        assert admission.started == (1,), "the capacity holds one"
        passes, passed = admission.passes, passed + 1
    assert passed == MAX_PASSES and admission.closed
    assert admit([long, PAIR], replace(capacity, tokens=40), passes=passes) == Admission((0,), 0 + 0)


# --- credit -----------------------------------------------------------------------------------------------------------


class BesideTraffic:
    """Lanes whose jobs always have a group, in engine steps that all serve.

    Args:
        lengths: for each lane, the tokens of the rows of its groups, which come again and again.
        budgets: of the engine steps, which come again and again.
    """

    def __init__(self, lengths: list[list[int]], budgets: list[int]) -> None:
        self.lanes = make_lanes(len(lengths), slots_per_lane=2, block_size=16)
        self.lengths, self.budgets = lengths, budgets
        self.credit = Credit()
        self.spent: list[int] = []
        self.waits = [0] * len(lengths)
        """Steps since a unit of the lane started."""

    def step(self) -> None:
        budget = self.budgets[len(self.spent) % len(self.budgets)]
        self.credit.accrue(budget, max(lane.largest for lane in self.lanes))
        for lane, lengths in zip(self.lanes, self.lengths, strict=True):
            if lane.group is None:
                lane.group = group_of(lengths, lane.slots)
                lane.group.open_wave()
        order = sorted(self.lanes, key=lambda lane: lane.tokens)  # as `by_need`, which wants jobs
        members = start(order, Capacity(1000, 1000, 1000, int(self.credit.amount)), UNLIMITED)
        self.waits = [
            0 if any(m.group is x.group for m in members) else n + 1
            for x, n in zip(self.lanes, self.waits, strict=True)
        ]
        for member in members:
            member.group.finish(member)
        for lane in self.lanes:
            lane.tokens += sum(len(m.token_ids) for m in members if m.group is lane.group)
            if lane.group is not None and lane.group.done:
                lane.group.close()
                lane.group = None
        self.spent.append(sum(len(m.token_ids) for m in members))
        self.credit.spend(self.spent[-1])

    def given(self) -> list[int]:
        return [self.budgets[i % len(self.budgets)] for i in range(len(self.spent))]


rows = st.lists(st.integers(2, 60), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(rows, min_size=1, max_size=3), budgets=st.lists(st.integers(0, 50), min_size=1, max_size=5))
@instance(lengths=[[17]], budgets=[32])
@instance(lengths=[[60], [2]], budgets=[3])
def test_the_average_never_exceeds_the_budget_and_every_lane_moves(
    lengths: list[list[int]], budgets: list[int]
) -> None:
    if not any(budgets):
        budgets = [1]
    traffic = BesideTraffic(lengths, budgets)
    largest = 2 * max(max(of_lane) for of_lane in lengths)
    # Until a unit starts: its own cost, and that of all that pass it (MAX_PASSES, and those of one more step).
    tokens = len(lengths) * largest * (2 + MAX_PASSES + (largest + max(budgets)) // 4)
    patience = len(budgets) * (2 + tokens // sum(budgets))
    for _ in range(300):
        traffic.step()
        assert max(traffic.waits) <= patience
    spent, given_ = list(accumulate(traffic.spent, initial=0)), list(accumulate(traffic.given(), initial=0))
    overdraft = [s - g for s, g in zip(spent, given_, strict=True)]
    assert max(overdraft) <= 0, "from the beginning on"
    # Over any stretch of steps: what the steps give, and what was saved before it.
    assert max(late - min(overdraft[: i + 1]) for i, late in enumerate(overdraft)) <= largest + max(budgets)


def test_rows_that_are_larger_than_the_budget_start_as_often_as_it_allows() -> None:
    """Two prompts of 17 tokens are more than 32: such a job stood still until no request was left."""
    traffic = BesideTraffic([[17]], [32])
    for _ in range(320):
        traffic.step()
    assert 0.95 * 320 * 32 < sum(traffic.spent) <= 320 * 32


def test_credit_is_not_saved_up_while_no_unit_waits() -> None:
    credit = Credit()
    for _ in range(1000):
        credit.accrue(10, largest=34)
    assert credit.amount == 44
    credit.accrue(10, largest=8)
    assert credit.amount == 44, "what is there stays"


# --- groups and slots -------------------------------------------------------------------------------------------------


def test_a_group_closes_when_its_last_member_is_scheduled_whatever_the_order() -> None:
    rng = random.Random(0)
    g = group(directions=3, rows=4, slots=2)
    seen = set()
    while not g.done:
        placement = g.open_wave()
        assert set(placement.values()) == {0, 1}
        while not g.wave_done:
            _, units = g.units()
            unit = rng.choice(units)
            assert len({member.sequence for member in unit}) == 1
            g.start(unit)
            for member in unit:
                if rng.random() < 0.3:  # not scheduled after all
                    g.put_back(member)
                else:
                    g.finish(member)
                    seen.add((member.probe, member.sequence))
    assert seen == {(p, r) for p in range(6) for r in range(4)}


def test_where_probes_differ_in_the_head_alone_one_member_stands_for_a_wave() -> None:
    slots = SlotTable(range(4))
    work = Work(ProbePlan(0, pairs(3), 0), (0, 1), (example(5), example(6)), learning_rate=0.1)
    g = PerturbationGroup("g", "j", work, slots, block_size=16, kv_of_base=True)
    seen = []
    while not g.done:
        placement = g.open_wave()
        costs, units = g.units()
        assert [cost.tokens for cost in costs] == [5, 6] and all(len(unit) == 1 for unit in units)
        for (member,) in units:
            assert member.probes == tuple(placement) and member.slot == placement[member.probes[0]]
            g.start([member])
            with pytest.raises(SlotError, match="members refer to it"):
                slots.release("g")
            g.finish(member)
            seen.append((member.probes, member.sequence))
    assert seen == [((0, 1, 2, 3), 0), ((0, 1, 2, 3), 1), ((4, 5), 0), ((4, 5), 1)]
    g.close()
    assert slots.free == [0, 1, 2, 3]


def test_members_that_write_are_one_for_each_probe() -> None:
    written = EncodedExample((ScoringSequence((1, 2), (), (), "generate", Generation(4, 1.0, 1.0, (2,))),))
    work = Work(ProbePlan(0, pairs(1), 0), (0,), (written,), learning_rate=0.1, sampling_seeds=(1,))
    g = PerturbationGroup("g", "j", work, SlotTable(range(2)), block_size=16, kv_of_base=True)
    g.open_wave()
    assert [member.probes for unit in g.units()[1] for member in unit] == [(0,), (1,)]


def test_a_member_counts_once() -> None:
    g = group(directions=1, rows=1, slots=2)
    g.open_wave()
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
