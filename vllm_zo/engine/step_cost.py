"""What an engine step costs, learned while the engine runs. Pure; `pacing.py` decides with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MEMORY = 200
"""Steps after which an observation counts 1/e: seconds of serving, short enough to follow a change of the load."""
ENOUGH = 8
"""Observations before an estimate is used."""
OUTLIER = 4.0
"""A step that took more than this many times what was expected counts as that: the system had other things to do."""


class StepCost:
    """Seconds of an engine step, linear in what it does: least squares over the latest steps.

        seconds = a . amounts;  a minimises  sum_i exp(-age_i / MEMORY) (seconds_i - a . amounts_i)^2

    A weak pull to the estimate of the step before keeps what the latest steps tell nothing about: without a single
    prefill among them, the cost of prefilled tokens stays what it was. (Plain forgetting would let it drift.)

    Args:
        amounts: how many numbers describe a step. The first one is 1 where a step has a fixed cost.
    """

    PULL = 1e-6

    def __init__(self, amounts: int) -> None:
        self._of: npt.NDArray[np.float64] = np.zeros(amounts)
        """Seconds for one of each."""
        self._squares = np.zeros((amounts, amounts))
        self._products = np.zeros(amounts)
        self.seen = 0

    @property
    def known(self) -> bool:
        return self.seen >= ENOUGH

    def learn(self, amounts: Sequence[float], seconds: float) -> None:
        """Take in a step that has ended."""
        x = np.asarray(amounts, dtype=float)
        if self.known:
            seconds = min(seconds, OUTLIER * max(self.seconds(amounts), 1e-6))
        keep = 1 - 1 / MEMORY
        self._squares = keep * self._squares + np.outer(x, x)
        self._products = keep * self._products + seconds * x
        pull = self.PULL * np.eye(len(x))
        self._of[:] = np.linalg.solve(self._squares + pull, self._products + self.PULL * self._of)
        self.seen += 1

    def seconds(self, amounts: Sequence[float]) -> float:
        """Seconds of a step that does so much; not below 0."""
        return max(float(np.dot(self._of, amounts)), 0.0)

    def most(self, seconds: float, fixed: int = 1) -> float:
        """How many tokens a step with the amounts (fixed, tokens) may have to end within `seconds`; 0: not even one."""
        fixed_s, each_s = (float(of) for of in self._of)
        return max((seconds - fixed * fixed_s) / max(each_s, 1e-9), 0.0)
