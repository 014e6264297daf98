"""How a job fits into the engine's ZO slots: which ranks a slot can have, and how many bases (M) a run keeps.

A probe's slot holds one rank block for each basis and one for the perturbation: (M + 1) * r columns. A method that
trains both factors of an adapter takes three blocks, a method that folds at every step takes one, and dense MeZO takes
none.
"""

from __future__ import annotations

from vllm_zo.errors import ConfigError
from vllm_zo.methods import Method
from vllm_zo.methods.adapter import num_blocks
from vllm_zo.methods.spaces import check_space, equals_published, num_intervals
from vllm_zo.validation import check_int

SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM 0.32 accepts for `max_lora_rank` (`MaxLoRARanks` in vllm/config/lora.py)."""

MANY_STEPS = 1 << 40
"""More steps than any run takes. A method whose epoch is still 0 then never refreshes V."""


def resolve_bases(method: Method, space: str, steps: int, slot_rank: int, requested: int | None = None) -> int:
    """How many bases (M) the run keeps: 1 in `fold`; in `bank` one for each interval, as far as the slot rank allows.

    Example: LoZO(rank=2, interval=50) in `bank` for 1,000 steps has 20 intervals. A slot of rank 16 has room for
    16/2 - 1 = 7 bases, so the run keeps 7.

    Args:
        steps: steps of the run.
        slot_rank: rank of a ZO slot (`zo_training={"slot_rank": ...}`).
        requested: M as the user set it (`bases=`), or None.

    Raises:
        ConfigError: the method cannot run in the space, its rank does not fit, or `requested` is too large.
    """
    check_space(method, space)
    rank = method.coordinates.rank
    # One block of the slot belongs to the perturbation, and no basis can have it.
    room = slot_rank // rank - 1
    if num_blocks(method.coordinates, 1) * rank > slot_rank:
        raise ConfigError(f"{_given(method, slot_rank)}: {_rank_fix(method, slot_rank)}")
    if space == "fold":
        if requested not in (None, 1):
            raise ConfigError(f"bases={requested}: update_space='fold' keeps one basis; drop bases, or use 'bank'.")
        return 1
    if requested is None:
        return min(num_intervals(method, steps), room)
    check_int("bases", requested, 1)
    # A LoZO run that is shorter than its interval also has one interval; only a method that never refreshes is refused.
    if requested > 1 and num_intervals(method, steps) == 1 and method.epoch(MANY_STEPS) == 0:
        raise ConfigError(f"bases={requested}: {method.name} keeps one basis for the whole run; drop bases.")
    if requested > room:
        raise ConfigError(
            f"bases={requested} with {_given(method, slot_rank)}: expected at most {room}; "
            f"for more, {_slot_rank_fix((requested + 1) * rank)}."
        )
    return requested


def describe_space(method: Method, space: str, steps: int, num_bases: int) -> str:
    """One line for the log. It names the space and the bases, and says whether the run equals the published method."""
    drawn = method.coordinates.refreshed
    if space == "fold":
        times = num_intervals(method, steps)
        return f"update_space=fold: equals {method.name} as published; {drawn} is drawn {times} times"
    rank = method.coordinates.rank
    bases = "1 basis" if num_bases == 1 else f"{num_bases} bases"
    line = f"update_space=bank: {bases} of rank {rank}, an adapter of rank {num_bases * rank}; "
    if steps >= MANY_STEPS:
        return f"{line}they take turns without end"
    if method.coordinates.measures_v:
        return f"{line}{drawn} is measured before the first step: not {method.name} as published"
    if method.coordinates.measures_u:
        return f"{line}the sizes of U's rows are measured before the first step: not {method.name} as published"
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
    blocks = num_blocks(method.coordinates, 1)
    needed = blocks * method.coordinates.rank
    smaller = f"set rank <= {slot_rank // blocks}, or " if slot_rank >= blocks else ""
    holds = "a slot holds a probe" if blocks == 1 else f"a slot holds an accumulator and a probe, {needed} in all"
    return f"{holds}; {smaller}{_slot_rank_fix(needed)}."
