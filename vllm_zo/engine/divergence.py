"""A guard over the training losses that tells when a run diverges."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 10
"""Steps in a mean: enough that one unlucky batch does not stop a run."""


class DivergenceGuard:
    """Compares the mean loss of the last steps with that of the first.

    Args:
        factor: `JobConfig.divergence_factor`; None: only losses that are not finite stop the run.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self._steps = 0
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=WINDOW)

    def note(self, loss: float) -> None:
        """Take in the loss of a step in nats; nan for a step that changed nothing."""
        self._steps += 1
        if len(self._first) < WINDOW:
            self._first.append(loss)
        self._last.append(loss)

    def verdict(self) -> str | None:
        """Why the run should stop, or None."""
        if len(self._last) < WINDOW:
            return None
        if not any(map(math.isfinite, self._last)):
            return f"the training loss was not finite in {WINDOW} steps in a row"
        if self.factor is None or self._steps < 2 * WINDOW:  # before that the two windows share steps
            return None
        first, last = _finite_mean(self._first), _finite_mean(self._last)
        # One nat on top: near a loss of zero, noise alone multiplies it by any factor.
        if last > self.factor * first + 1.0:
            return f"the training loss rose from {first:.3f} to {last:.3f} nats (mean of {WINDOW} steps)"
        return None


def _finite_mean(values: Iterable[float]) -> float:
    """The mean of the finite values; infinity if there are none, so that no later loss counts as risen."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf
