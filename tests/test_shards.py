"""How a step is cut into shards: a pure function, and shards that give the whole step back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_zo import FZOO, LoZO
from vllm_zo.engine.group import Work
from vllm_zo.engine.open_step import OpenStep
from vllm_zo.methods.plan import Probe, ProbePlan
from vllm_zo.methods.shards import Shard, cut
from vllm_zo.objectives import Classification
from vllm_zo.objectives.base import EncodedExample, ScoringSequence

two_sided = st.builds(lambda queries: LoZO(queries=queries).plan(0, 0, 0), st.integers(1, 9))
one_sided = st.builds(lambda queries: FZOO(queries=queries).plan(0, 0, 0), st.integers(2, 9))
plans, sizes = st.one_of(two_sided, one_sided), st.integers(1, 20)


@given(plans, sizes, sizes)
def test_every_cell_is_in_one_shard_and_no_shard_is_empty(plan: ProbePlan, examples: int, shards: int) -> None:
    parts = cut(plan, examples, shards)
    cells = [cell for part in parts for cell in itertools.product(part.probes, part.examples)]
    assert sorted(cells) == list(itertools.product(range(len(plan.probes)), range(examples)))
    assert 1 <= len(parts) <= shards and all(part.probes and part.examples for part in parts)
    if examples >= shards or len(plan.keys) >= shards:
        assert len(parts) == shards


@given(plans, sizes, sizes)
def test_both_signs_of_a_direction_meet_in_one_shard(plan: ProbePlan, examples: int, shards: int) -> None:
    for part in cut(plan, examples, shards):
        keys = {plan.probes[i].key for i in part.probes if plan.probes[i].sign}
        assert [i for i, p in enumerate(plan.probes) if p.sign and p.key in keys] == [
            i for i in part.probes if plan.probes[i].sign
        ]


def test_a_cut_that_can_be_checked_by_hand() -> None:
    plan = LoZO(queries=2).plan(0, 0, 0)
    assert cut(plan, 4, 2) == (Shard((0, 1), (0, 1, 2, 3)), Shard((2, 3), (0, 1, 2, 3)))
    assert cut(plan, 4, 3) == (
        Shard((0, 1, 2, 3), (0, 1)), Shard((0, 1, 2, 3), (2,)), Shard((0, 1, 2, 3), (3,)),
    )  # fmt: skip
    assert cut(plan, 2, 4) == tuple(Shard(probes, (e,)) for probes in ((0, 1), (2, 3)) for e in (0, 1))
    assert len(cut(plan, 2, 100)) == 4, "no more shards than (direction, example) pairs"


def test_a_centre_is_not_taken_for_a_direction_whose_key_is_zero() -> None:
    plan = ProbePlan(0, (Probe(0, 0, 1e-3), Probe(0, 1, 1e-3), Probe(0, -1, 1e-3)), 0)
    assert [part.probes for part in cut(plan, 1, 2)] == [(0,), (1, 2)]


def test_a_part_of_a_plan_keeps_the_numbers_of_its_directions() -> None:
    plan = LoZO(queries=3).plan(0, 0, 0)
    part = plan.part((4, 5))
    assert (
        part.probes == plan.probes[4:] and part.keys == plan.keys and plan.part(range(6)).part((0,)).keys == plan.keys
    )


OBJECTIVE = Classification("{sentence} It was", [" bad", " good"])


def step_of(queries: int, tokens: list[int], **of_work: Any) -> Work:
    def sequence(length: int) -> ScoringSequence:
        return ScoringSequence(tuple(range(length)), (length - 1,), (5, 6), "labels")

    examples = tuple(EncodedExample((sequence(length),), gold=length % 2) for length in tokens)
    plan = LoZO(queries=queries, eps=1e-2).plan(0, 7, 0)
    return Work(plan, tuple(range(10, 10 + len(tokens))), examples, 1e-3, **of_work)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 12), st.randoms())
def test_shards_in_any_order_and_repeated_decide_as_the_whole_step(
    queries: int, examples: int, shards: int, random: Any
) -> None:
    work = step_of(queries, [3 + i for i in range(examples)])
    whole = torch.randn(2 * queries, 2 * examples, generator=torch.Generator().manual_seed(queries))
    decided = []
    for order in ("as issued", "any"):
        step = OpenStep(work, shards)
        parts = list(iter(step.next_shard, None))
        if order == "any":
            parts = random.sample(parts, len(parts)) + parts[:1]
        done = []
        for part in parts:
            rows = [work.plan.probes.index(probe) for probe in part.plan.probes]
            columns = [c for e in part.example_ids for c in (2 * (e - 10), 2 * (e - 10) + 1)]
            done.append(step.add(part.shard, whole[rows][:, columns].tolist()))
        assert done.index(True) == len(cut(work.plan, examples, shards)) - 1, "done with the last shard, not before"
        decided.append(step.decide("g", LoZO(queries=queries, eps=1e-2), OBJECTIVE, None))
    losses, _ = OBJECTIVE.loss(whole, work.examples)
    expected = LoZO(queries=queries, eps=1e-2).coefficients(work.plan, losses)
    assert decided[0] == decided[1]
    assert decided[0].losses == losses.tolist() and decided[0].coefficients == expected.tolist() and decided[0].finite


def test_a_cell_that_is_not_finite_makes_a_step_that_changes_nothing() -> None:
    step = OpenStep(step_of(1, [3, 4]), 2)
    assert not step.add(0, [[1.0, 2.0], [1.5, 2.0]]) and step.add(1, [[float("nan"), 2.0], [1.5, 2.0]])
    decided = step.decide("g", LoZO(), OBJECTIVE, max_coefficient=1.0)
    assert not decided.finite and decided.coefficients == [0.0]


def test_a_shard_has_the_sampling_seeds_of_its_own_sequences() -> None:
    step = OpenStep(step_of(1, [3, 4, 5], sampling_seeds=(70, 80, 90)), 2)
    assert [part.sampling_seeds for part in iter(step.next_shard, None)] == [(70, 80), (90,)]


def test_a_dropped_shard_comes_again_before_the_others() -> None:
    step = OpenStep(step_of(1, [3, 4, 5]), 3)
    first = step.next_shard()
    assert first is not None and first.shard == 0
    step.put_back(0)
    assert [part.shard for part in iter(step.next_shard, None)] == [0, 1, 2]


@pytest.mark.parametrize("shards", [0, -1, 1.5])
def test_a_number_of_shards_that_cannot_be_is_refused(shards: Any) -> None:
    from vllm_zo import ConfigError, JobConfig

    with pytest.raises(ConfigError, match="shards"):
        JobConfig(objective=OBJECTIVE, shards=shards)
