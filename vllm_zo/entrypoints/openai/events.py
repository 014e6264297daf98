"""Live events: whoever waits for a job is woken when something of it is written."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator

from vllm_zo.entrypoints.openai.store import Store
from vllm_zo.entrypoints.openai.wire import FINAL

KEEP_ALIVE_S = 15.0
"""Between comments that keep proxies from closing a quiet stream."""
BATCH = 1000


class EventHub:
    """Who waits for which job; for one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)

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
            if not self._waiting[job_id]:
                del self._waiting[job_id]


async def event_stream(store: Store, hub: EventHub, job_id: str, after: str | None) -> AsyncIterator[str]:
    """Events of a job as server-sent events, oldest first, until the job has ended: then `data: [DONE]`.

    Args:
        after: id of the last event that is known already.
    """
    with hub.listening(job_id) as signal:
        while True:
            signal.clear()
            job = await asyncio.to_thread(store.find, "jobs", job_id)  # before its events: none may be missed
            while True:
                page = await asyncio.to_thread(
                    store.page, "events", after=after, limit=BATCH, parent=job_id, oldest_first=True
                )
                for event in page.data:
                    after = event["id"]
                    yield f"id: {after}\ndata: {json.dumps(event)}\n\n"
                if not page.has_more:
                    break
            if job is None or job["status"] in FINAL:
                yield "data: [DONE]\n\n"
                return
            try:
                await asyncio.wait_for(signal.wait(), KEEP_ALIVE_S)
            except TimeoutError:
                yield ": waiting\n\n"
