"""The pace of a job, measured over a small window of its latest groups."""

from __future__ import annotations

import time
from collections import deque

WINDOW = 32
"""Number of groups in the window: seconds to minutes of training, short enough to show a change of pace."""


class JobMeter:
    """Times a job's training groups, from the scheduling of the first member to the arrival of the losses."""

    def __init__(self) -> None:
        self._groups: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        """(time of the result, seconds since the group was opened)."""

    def note(self, opened_at: float) -> None:
        """Note that the result of a group has arrived; `opened_at` is when the group was opened (`time.monotonic`)."""
        now = time.monotonic()
        self._groups.append((now, now - opened_at))

    @property
    def group_latency_s(self) -> float | None:
        """Mean seconds from opening a group to its result; None before the first."""
        return sum(seconds for _, seconds in self._groups) / len(self._groups) if self._groups else None

    @property
    def steps_per_second(self) -> float | None:
        """Mean over the window; None before two steps."""
        if len(self._groups) < 2:
            return None
        # Two results may come back in one engine step, closer together than the clock can tell.
        return (len(self._groups) - 1) / max(self._groups[-1][0] - self._groups[0][0], 1e-9)
