"""Cuts a training step into shards: rectangles of probes and examples that are scored apart from each other.

The cut is a function of the plan, the number of examples and the number of shards. It does not know how many engines
there are, so that a job has the same shards, and each shard is the same batch, on any number of them.

    K directions, S shards          cut
    K >= S                          into S runs of directions, with all examples
    K < S <= E                      into S runs of examples, with all directions
    else                            into a grid of single directions and runs of examples, at most S shards

Probes of one direction stay together, for their difference is what counts: both signs meet the same rounding. The
centre of a one-sided estimate counts as a direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from vllm_zo.methods.plan import ProbePlan

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A part of a step, as indices into the plan's probes and into the step's examples. Both ascend."""

    probes: tuple[int, ...]
    examples: tuple[int, ...]


def cut(plan: ProbePlan, num_examples: int, shards: int) -> tuple[Shard, ...]:
    """The shards of a step. Every (probe, example) is in exactly one of them, and none is empty.

    Example: two directions, 4 examples and 3 shards give examples (0, 1), (2,) and (3,), each under all 4 probes.

    Args:
        shards: the number that is wanted, at least 1. There are fewer where the step has fewer parts.
    """
    directions = _directions(plan)
    all_probes = [probe for direction in directions for probe in direction]
    every: Sequence[int] = range(num_examples)
    if len(directions) >= shards:
        runs = [[probe for direction in run for probe in direction] for run in _runs(directions, shards)]
        rectangles = [(run, every) for run in runs]
    elif num_examples >= shards:
        rectangles = [(all_probes, run) for run in _runs(every, shards)]
    else:
        runs_each = min(num_examples, shards // len(directions))
        rectangles = [(direction, run) for direction in directions for run in _runs(every, runs_each)]
    return tuple(Shard(tuple(sorted(probes)), tuple(examples)) for probes, examples in rectangles)


def _directions(plan: ProbePlan) -> list[list[int]]:
    """The probes of each direction, in order of first appearance; the centre is one of its own."""
    # With the sign: the key of a centre names no direction, and could equal that of one.
    by_direction: dict[tuple[int, bool], list[int]] = {}
    for index, probe in enumerate(plan.probes):
        by_direction.setdefault((probe.key, probe.sign == 0), []).append(index)
    return list(by_direction.values())


def _runs(parts: Sequence[T], count: int) -> list[Sequence[T]]:
    """`parts` in `count` runs whose lengths differ by at most one, the longer ones first."""
    short, longer = divmod(len(parts), count)
    ends = [index * short + min(index, longer) for index in range(count + 1)]
    return [parts[start:end] for start, end in pairwise(ends)]
