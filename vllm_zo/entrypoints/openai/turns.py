"""Who may be in the engine now: in the order of arrival, at most so many together, and some alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """For one event loop.

    Args:
        limit: jobs that run together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.alone: str | None = None
        """The job that has the engine to itself."""
        self._running: set[str] = set()
        self._waiting: list[str] = []
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def turn(self, job_id: str, *, alone: bool) -> AsyncIterator[None]:
        """Wait for a turn; it lasts as long as the block. A job that must run alone holds up those behind it."""
        async with self._changed:
            self._waiting.append(job_id)
            try:
                await self._changed.wait_for(lambda: self._may_run(job_id, alone))
                self._running.add(job_id)
                self.alone = job_id if alone else None
            finally:
                self._waiting.remove(job_id)
                self._changed.notify_all()
        try:
            yield
        finally:
            async with self._changed:
                self._running.discard(job_id)
                self.alone = None if alone else self.alone
                self._changed.notify_all()

    def _may_run(self, job_id: str, alone: bool) -> bool:
        if self._waiting[0] != job_id or self.alone is not None:
            return False
        return not self._running if alone else len(self._running) < self.limit

    def has_turn(self, job_id: str) -> bool:
        return job_id in self._running

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting
