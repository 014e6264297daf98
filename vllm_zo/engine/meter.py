"""How fast a job goes: a small window of its latest groups."""

from __future__ import annotations

import time
from collections import deque

WINDOW = 32
"""Groups that the figures are taken over: seconds to minutes of training, short enough to show a change."""


class JobMeter:
    """Times a job's training groups, from the scheduling of the first member to the arrival of the losses."""

    def __init__(self) -> None:
        self._opened: dict[str, float] = {}
        self._closed: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        """(time of the result, seconds since the group was opened)."""

    def open(self, group_id: str) -> None:
        self._opened[group_id] = time.monotonic()

    def close(self, group_id: str) -> None:
        now = time.monotonic()
        self._closed.append((now, now - self._opened.pop(group_id)))

    def drop(self, group_id: str) -> None:
        self._opened.pop(group_id, None)

    @property
    def group_latency_s(self) -> float | None:
        """Mean seconds from opening a group to its result; None before the first."""
        return sum(seconds for _, seconds in self._closed) / len(self._closed) if self._closed else None

    @property
    def steps_per_second(self) -> float | None:
        """Over the window; None before two steps."""
        if len(self._closed) < 2:
            return None
        return (len(self._closed) - 1) / max(self._closed[-1][0] - self._closed[0][0], 1e-9)
