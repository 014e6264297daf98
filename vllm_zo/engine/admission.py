"""What may start now: pure functions of slots, sequences, tokens, KV blocks and serving demand.

Vocabulary: a group's *members* are (probe, row) pairs. Members of one row under the signs of one direction form a
*unit* and start together, so that a pair is never split between adapter states. When a plan needs more slots than there
are, its probes run in *probe waves*.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_zo.errors import ConfigError
from vllm_zo.methods.base import Probe

UNLIMITED = sys.maxsize
"""Of something that training does not use in a step."""


@dataclass(frozen=True)
class Capacity:
    """What is left for training in one engine step, after serving took what it wants."""

    sequences: int
    tokens: int
    kv_blocks: int

    def less(self, units: Sequence[Unit]) -> Capacity:
        """What `units` leave of it."""
        return Capacity(
            self.sequences - sum(unit.members for unit in units),
            max(self.tokens - sum(unit.tokens for unit in units), 0),
            self.kv_blocks - sum(unit.kv_blocks for unit in units),
        )


@dataclass(frozen=True)
class Demand:
    """What serving requests, running and waiting, want from one engine step."""

    requests: int = 0
    tokens: int = 0
    kv_blocks: int = 0
    waiting: int = 0
    """How many of `requests` do not hold a sequence yet."""


@dataclass(frozen=True)
class Unit:
    """Members that start together: one row under all signs of one direction."""

    members: int
    tokens: int
    kv_blocks: int


def plan_waves(probes: Sequence[Probe], slots: int) -> list[tuple[int, ...]]:
    """Split probe indices into waves of at most `slots`, never separating the signs of one direction.

    >>> plan_waves([Probe(7, 1, .1), Probe(7, -1, .1), Probe(8, 1, .1), Probe(8, -1, .1)], slots=2)
    [(0, 1), (2, 3)]
    """
    directions: dict[tuple[int, bool], list[int]] = {}
    for index, probe in enumerate(probes):
        directions.setdefault((probe.seed, probe.sign == 0), []).append(index)
    waves: list[list[int]] = []
    for indices in directions.values():
        if len(indices) > slots:
            raise ConfigError(
                f"slots={slots}: a direction needs {len(indices)} adapter slots at once; set slots >= that."
            )
        if not waves or len(waves[-1]) + len(indices) > slots:
            waves.append([])
        waves[-1].extend(indices)
    return [tuple(wave) for wave in waves]


def capacity_for_training(total: Capacity, demand: Demand, token_budget: int | None) -> Capacity:
    """What serving leaves over. Serving comes first; beside serving, training takes at most `token_budget` tokens."""
    tokens = total.tokens - demand.tokens
    if demand.requests and token_budget is not None:
        tokens = min(tokens, token_budget)
    return Capacity(
        sequences=max(total.sequences - demand.waiting, 0),
        tokens=max(tokens, 0),
        kv_blocks=max(total.kv_blocks - demand.kv_blocks, 0),
    )


def admit(units: Sequence[Unit], capacity: Capacity, *, engine_is_empty: bool) -> int:
    """How many units, from the front, start in this step.

    A unit is admitted when all its members fit whole, so that they finish their prefill in the step. A unit that is
    larger than anything the engine can do in one step would wait for ever: when nothing else is running it starts alone
    and the engine prefills it in chunks.
    """
    admitted = members = tokens = blocks = 0
    for unit in units:
        members += unit.members
        tokens += unit.tokens
        blocks += unit.kv_blocks
        if members > capacity.sequences or tokens > capacity.tokens or blocks > capacity.kv_blocks:
            break
        admitted += 1
    if admitted == 0 and units and engine_is_empty:
        first = units[0]
        if first.members <= capacity.sequences and first.kv_blocks <= capacity.kv_blocks and capacity.tokens > 0:
            return 1
    return admitted
