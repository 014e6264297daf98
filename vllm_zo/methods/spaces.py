"""Update spaces: where a job's update lives, which method runs in which, and how many bases a run keeps.

    bank   The base weights are never written. V cycles through M seeds; each basis has its own accumulator, and the
           adapter is M*r wide, exact, and can be served at any moment.
    fold   `W += U_acc V^T` before every refresh of V: the method as published. The engine is then this job's.

A probe's slot holds one rank block for each basis and one for the perturbation: (M + 1) * r rows of A. (An adapter of
which both factors are trained takes three; a method that folds at every step takes one.)
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_zo.errors import ConfigError
from vllm_zo.methods import Method, known_methods
from vllm_zo.validation import check_int, check_known

SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM 0.32 accepts for `max_lora_rank`."""

MANY_STEPS = 1 << 40
"""More than any run takes."""

SPACES = {
    "bank": "base weights untouched; the result is an adapter, served beside other traffic at any moment",
    "fold": "base weights written at every refresh of V; the engine serves this job alone; the result is a model",
}


@dataclass(frozen=True)
class SpaceRow:
    """One cell of the table method x space."""

    method: str
    space: str
    runs: bool
    remark: str


def space_table() -> list[SpaceRow]:
    """The table method x space, for the documentation and for `vllm-zo doctor`."""
    rows = []
    for name, method in known_methods().items():
        for space, remark in SPACES.items():
            runs = space in method.update_spaces
            why = method.refusals.get(space, f"use {' or '.join(method.update_spaces)}")
            rows.append(SpaceRow(name, space, runs, remark if runs else why))
    return rows


def check_space(method: Method, space: str) -> None:
    """Refuse an unknown space, or one the method cannot run in."""
    check_known("update_space", space, SPACES)
    method.check_space(space)


def resolve_bases(method: Method, space: str, steps: int, slot_rank: int, requested: int | None = None) -> int:
    """How many bases (M) the run keeps: 1 in `fold`; in `bank` one for each interval, as far as the slot rank goes.

    Example: LoZO(rank=2, interval=50), bank, 1,000 steps, slot_rank 16: 20 intervals, room for 16/2 - 1 = 7 -> 7.

    Args:
        steps: steps of the run.
        slot_rank: rank of a ZO slot (`zo_training={"slot_rank": ...}`).
        requested: M as set by the user (`bases=`), or None.

    Raises:
        ConfigError: the method cannot run in the space, its rank does not fit, or `requested` is too large.
    """
    check_space(method, space)
    rank = method.coordinates.rank
    room = slot_rank // rank - 1
    if method.coordinates.num_blocks(1) * rank > slot_rank:
        raise ConfigError(f"{_given(method, slot_rank)}: {_rank_fix(method, slot_rank)}")
    if space == "fold":
        if requested not in (None, 1):
            raise ConfigError(f"bases={requested}: update_space='fold' keeps one basis; drop bases, or use 'bank'.")
        return 1
    if requested is None:
        return min(num_intervals(method, steps), room)
    check_int("bases", requested, 1)
    if requested > 1 and num_intervals(method, steps) == 1 and method.epoch(MANY_STEPS) == 0:
        raise ConfigError(f"bases={requested}: {method.name} keeps one basis for the whole run; drop bases.")
    if requested > room:
        raise ConfigError(
            f"bases={requested} with {_given(method, slot_rank)}: expected at most {room}; "
            f"for more, {_slot_rank_fix((requested + 1) * rank)}."
        )
    return requested


def basis_of(method: Method, step: int, space: str, num_bases: int) -> int:
    """Index of V at `step`: in `bank` the bases return in turn, in `fold` every refresh is a new one."""
    epoch = method.epoch(step)
    return epoch % num_bases if space == "bank" else epoch


def num_intervals(method: Method, steps: int) -> int:
    """Intervals of constant V in a run of `steps`, at least 1: ceil(steps / interval) for LoZO."""
    return method.epoch(steps - 1) + 1 if steps else 1


def equals_published(method: Method, space: str, steps: int, num_bases: int) -> bool:
    """Whether no basis is used twice (for LoZO: steps <= M * interval), which makes the run the published algorithm."""
    return space == "fold" or num_intervals(method, steps) <= num_bases


def describe_space(method: Method, space: str, steps: int, num_bases: int) -> str:
    """One line for the log: the space, the bases, and whether the run equals the method as published."""
    drawn = method.coordinates.refreshed
    if space == "fold":
        times = num_intervals(method, steps)
        return f"update_space=fold: equals {method.name} as published; {drawn} is drawn {times} times"
    rank = method.coordinates.rank
    bases = "1 basis" if num_bases == 1 else f"{num_bases} bases"
    line = f"update_space=bank: {bases} of rank {rank}, an adapter of rank {num_bases * rank}; "
    needed = num_intervals(method, steps)
    if equals_published(method, space, steps, num_bases):
        return f"{line}{drawn} is drawn {needed} times and none returns: equals {method.name} as published"
    fitting = _fitting_slot_rank((needed + 1) * rank)
    exact = f"slot_rank={fitting} or update_space=fold" if fitting else "update_space=fold"
    return f"{line}{needed} intervals share them, so {drawn} returns: not {method.name} as published ({exact} would be)"


def _given(method: Method, slot_rank: int) -> str:
    return f"{method.name}.rank={method.coordinates.rank} and slot_rank={slot_rank}"


def _fitting_slot_rank(rank: int) -> int | None:
    return next((allowed for allowed in SLOT_RANKS if allowed >= rank), None)


def _slot_rank_fix(rank: int) -> str:
    fitting = _fitting_slot_rank(rank)
    return f"set slot_rank={fitting}" if fitting else f"vLLM has no slot rank >= {rank}"


def _rank_fix(method: Method, slot_rank: int) -> str:
    blocks = method.coordinates.num_blocks(1)
    needed = blocks * method.coordinates.rank
    smaller = f"set rank <= {slot_rank // blocks}, or " if slot_rank >= blocks else ""
    holds = "a slot holds a probe" if blocks == 1 else f"a slot holds an accumulator and a probe, {needed} in all"
    return f"{holds}; {smaller}{_slot_rank_fix(needed)}."
