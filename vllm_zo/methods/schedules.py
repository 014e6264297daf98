"""Schedules of learning rate and probe radius: pure functions of the step, in Python's float64."""

from __future__ import annotations

import math
from typing import Literal, get_args

LRSchedule = Literal["constant", "linear", "cosine"]
LR_SCHEDULES: tuple[str, ...] = get_args(LRSchedule)


def learning_rate_at(schedule: LRSchedule, base: float, step: int, total_steps: int, warmup: int = 0) -> float:
    """The learning rate of `step` (counted from 0).

        warm-up   base * (step + 1) / warmup             for step < warmup: the first step already moves
        constant  base
        linear    base * (1 - p)                         p = (step - warmup) / (total_steps - warmup)
        cosine    base * (1 + cos(pi p)) / 2

    `linear` and `cosine` start at `base` and would reach 0 at `total_steps`, one step after the last. In `transformers`
    warm-up begins with a step of learning rate 0. Here it does not, because that would waste the step's probes.

    Example:
        >>> [learning_rate_at("linear", 1.0, step, 4) for step in range(4)]
        [1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "constant":
        return base
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    if schedule == "linear":
        return base * (1.0 - progress)
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))


EPS_FLOOR = 0.1
"""An eps schedule ends at this share of eps. With a radius near 0 the difference of two losses would be rounding."""


def eps_factor_at(schedule: LRSchedule, step: int, total_steps: int) -> float:
    """The factor of the probe radius at `step`. It starts at 1; "linear" and "cosine" lower it to EPS_FLOOR.

    Example:
        >>> [round(eps_factor_at("linear", step, 3), 1) for step in range(3)]
        [1.0, 0.7, 0.4]
    """
    if schedule == "constant":
        return 1.0
    return EPS_FLOOR + (1.0 - EPS_FLOOR) * learning_rate_at(schedule, 1.0, step, total_steps)
