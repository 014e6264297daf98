"""Live events: a hub that wakes the clients that wait for a job, and the stream that they read.

The text of server-sent events takes three lines of code. sse-starlette would only add pings, and this package has it
only through dependencies of vLLM's dependencies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from typing import Any

from vllm_zo.entrypoints.server.state.store import Store

KEEP_ALIVE_S = 15.0
"""Seconds between two comments in a quiet stream. Proxies close a connection that is silent, many after 60 s."""
BATCH = 1000
"""Events that one read of the store returns: the lock of the store is free between two reads."""


class EventHub:
    """Knows which clients wait for which job. Call it on one event loop only: asyncio.Event is not thread-safe."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)
        self.unwritten: dict[str, dict[str, Any]] = {}
        """Job id -> the event that the job waits for a full disk. The store has it once there is room; until then
        clients learn of it here."""

    def notify(self, job_id: str) -> None:
        for waiting in self._waiting.get(job_id, ()):
            waiting.set()

    @contextlib.contextmanager
    def listening(self, job_id: str) -> Iterator[asyncio.Event]:
        signal = asyncio.Event()
        self._waiting[job_id].add(signal)
        try:
            yield signal
        finally:
            self._waiting[job_id].discard(signal)
            # Else the hub would grow with every job that a client has ever followed.
            if not self._waiting[job_id]:
                del self._waiting[job_id]


async def event_stream(store: Store, hub: EventHub, job_id: str, after: str | None) -> AsyncIterator[str]:
    """The events of a job as server-sent events, oldest first. After the end of the job comes `data: [DONE]`.

    Args:
        after: id of the last event that the client has already; None: from the first event.
    """
    told: str | None = None  # id of the last event that came from memory: the store will give it once more
    with hub.listening(job_id) as signal:
        while True:
            # Cleared before reading: an event that is written meanwhile sets it again, and no wait follows.
            signal.clear()
            # The job before its events: a job is written as ended together with its last events, so that these are
            # there when it has ended. The other way round the stream could end without them.
            job = await asyncio.to_thread(store.job, job_id)
            while True:
                page = await asyncio.to_thread(
                    store.page, "events", after=after, limit=BATCH, parent=job_id, oldest_first=True
                )
                for event in page.data:
                    after = event["id"]
                    if after != told:
                        yield f"id: {after}\ndata: {json.dumps(event)}\n\n"
                if not page.has_more:
                    break
            if (note := hub.unwritten.get(job_id)) is not None and note["id"] != told:
                told = note["id"]
                # Without an `id:` line: a client that comes back with it would name an event that the store lacks.
                yield f"data: {json.dumps(note)}\n\n"
            if job.status.ended:
                yield "data: [DONE]\n\n"
                return
            try:
                await asyncio.wait_for(signal.wait(), KEEP_ALIVE_S)
            except TimeoutError:
                yield ": waiting\n\n"
