"""What may start now: pure functions of slots, sequences, tokens, KV blocks and serving demand.

Vocabulary: a group's *members* are (probe, sequence) pairs. Members of one sequence under the signs of one direction
form a *unit* and start together, so that a pair is never split between adapter states. When a plan needs more slots
than there are, its probes run in *probe waves*.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_zo.errors import ConfigError
from vllm_zo.methods.plan import Probe

UNLIMITED = sys.maxsize
"""The capacity of a resource that training does not use in a step."""
MAX_PASSES = 8
"""How many units may start before one that stood in front of them. Each makes it wait for a step or two more."""


@dataclass(frozen=True)
class Capacity:
    """What is left for training in one engine step, after serving took its share."""

    sequences: int
    tokens: int
    kv_blocks: int
    credit: int = UNLIMITED
    """Tokens that may be used beside serving requests, saved up from earlier steps (`Credit`)."""

    def holds(self, unit: Unit) -> bool:
        """Whether the unit can start in this step, and end its prefill in it."""
        return unit.tokens <= self.tokens and self.holds_in_chunks(unit)

    def holds_in_chunks(self, unit: Unit) -> bool:
        """Whether the unit can start in this step, and end its prefill in a later one."""
        fits = unit.members <= self.sequences and unit.kv_blocks <= self.kv_blocks
        return fits and self.tokens > 0 and unit.cost <= self.credit

    def less(self, units: Iterable[Unit]) -> Capacity:
        """The capacity that `units` leave."""
        sequences, tokens, kv_blocks, credit = self.sequences, self.tokens, self.kv_blocks, self.credit
        for unit in units:
            sequences -= unit.members
            tokens = max(tokens - unit.tokens, 0)  # a unit that is prefilled in chunks has more tokens than the step
            kv_blocks -= unit.kv_blocks
            credit -= unit.cost
        return Capacity(sequences, tokens, kv_blocks, credit)


NOTHING = Capacity(0, 0, 0, 0)


@dataclass(frozen=True)
class Demand:
    """What serving requests, running and waiting, want from one engine step."""

    requests: int = 0
    tokens: int = 0
    kv_blocks: int = 0
    waiting: int = 0
    """How many of `requests` do not hold a sequence yet."""
    first_tokens: bool = False
    """Whether one of them waits for its first token."""


@dataclass(frozen=True)
class Unit:
    """Members that start together: one sequence under all signs of one direction."""

    members: int
    tokens: int
    """What it prefills."""
    kv_blocks: int
    to_write: int = 0
    """The most tokens that vLLM schedules for it after the prefill, where its members generate."""

    @property
    def cost(self) -> int:
        """All tokens that starting it commits the engine to."""
        return self.tokens + self.to_write


class Credit:
    """What training may use beside serving requests, saved up from one engine step to the next: a token bucket.

    Each step that serves adds its budget, and what training uses in such a step is taken off. Members start only when
    the credit covers them whole. So the average is the budget, whatever the lengths, and a unit that is larger than the
    budget of a step starts once in several steps.
    """

    def __init__(self) -> None:
        self.amount = 0.0

    def accrue(self, budget: float, largest: float) -> None:
        """Add the budget of a step.

        Args:
            largest: what the largest unit that waits costs, with all that running members may still use. Little more
                is ever saved: a job that had nothing to run for an hour must not fill the steps of the next minute.
        """
        self.amount = min(self.amount + budget, max(self.amount, budget + largest))

    def spend(self, amount: float) -> None:
        self.amount -= amount


def plan_waves(probes: Sequence[Probe], slots: int, at_once: int | None = None) -> list[tuple[int, ...]]:
    """Split probe indices into waves of at most `slots`, never separating the signs of one direction.

    >>> plan_waves([Probe(7, 1, .1), Probe(7, -1, .1), Probe(8, 1, .1), Probe(8, -1, .1)], slots=2)
    [(0, 1), (2, 3)]

    Args:
        at_once: the method's own limit on probes in a wave. A method that writes a probe into the base weights can
            hold one at a time, so with a limit the signs of a direction may be separated.

    Raises:
        ConfigError: a direction needs more slots than there are.
    """
    if at_once is not None:
        size = min(at_once, slots)
        return [tuple(range(i, min(i + size, len(probes)))) for i in range(0, len(probes), size)]
    # The key of a centre (sign 0) names no direction: without the sign it could join the direction of the same key.
    directions: dict[tuple[int, bool], list[int]] = {}
    for index, probe in enumerate(probes):
        directions.setdefault((probe.key, probe.sign == 0), []).append(index)
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


def capacity_for_training(total: Capacity, demand: Demand) -> Capacity:
    """The capacity that serving leaves. Credit counts beside serving requests only."""
    return Capacity(
        sequences=max(total.sequences - demand.waiting, 0),  # running requests hold theirs: `total` is without them
        tokens=max(total.tokens - demand.tokens, 0),
        kv_blocks=max(total.kv_blocks - demand.kv_blocks, 0),
        credit=max(total.credit, 0) if demand.requests else UNLIMITED,
    )


@dataclass(frozen=True)
class Admission:
    """What starts in this step.

    Attributes:
        started: indices of the units that start, ascending.
        passes: how many units have started before the first one that waits, and stood behind it; 0 if none waits.
    """

    started: tuple[int, ...]
    passes: int

    @property
    def closed(self) -> bool:
        """Whether nothing else may start: what is left is saved for the unit that waits."""
        return self.passes >= MAX_PASSES


def admit(
    units: Sequence[Unit], capacity: Capacity, *, passes: int = 0, in_chunks_beyond: int = UNLIMITED
) -> Admission:
    """Which units start in this step.

    A unit starts when the capacity holds it whole: its members then end their prefill in the step. Units behind one
    that has to wait may pass it if they are small enough, but only MAX_PASSES times. After that nothing starts until it
    does, so that what is left of each step's budget adds up to what it costs.

    Args:
        passes: `Admission.passes` of the step before, for the unit that is the first one now.
        in_chunks_beyond: the most tokens that the engine can do in one step, if no member has tokens left; a first unit
            that is larger would wait for ever, so it starts alone and the engine prefills it in chunks.
    """
    if units and units[0].tokens > in_chunks_beyond and capacity.holds_in_chunks(units[0]):
        return Admission((0,), 0)
    started: list[int] = []
    waiting: int | None = None
    for index, unit in enumerate(units):
        if waiting is not None and passes >= MAX_PASSES:
            break
        if capacity.holds(unit):
            started.append(index)
            capacity = capacity.less([unit])
            passes += waiting is not None
        elif waiting is None:
            waiting, passes = index, passes if index == 0 else 0
    return Admission(tuple(started), 0 if waiting is None else passes)
