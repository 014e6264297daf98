"""An engine behind vLLM's data-parallel client: its scheduler with seats for the jobs of the front end's coordinators.

Messages come and go as EngineCore utility calls (`zo_tell`, `zo_hear`), pickled: both ends are processes of one server.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from vllm_zo.cluster.protocol import FromEngine, ToEngine
from vllm_zo.cluster.seat import Seat, TrainingScheduler

SCHEDULER = "vllm_zo.entrypoints.cluster.seats.make_scheduler"


def make_scheduler(*args: Any, **kwargs: Any) -> Any:
    """The engine's `scheduler_cls` where several engines train one job."""
    from vllm_zo.engine import scheduler

    made: Any = scheduler.make_scheduler(*args, **kwargs)
    made.zo_calls.seats = Seats(made)
    return made


def packed(messages: Sequence[tuple[str, ToEngine | FromEngine]]) -> bytes:
    """Messages of several jobs, as (job id, message), in their order."""
    return pickle.dumps(messages)


def unpacked(messages: bytes) -> Sequence[tuple[str, Any]]:
    unpickled: Sequence[tuple[str, Any]] = pickle.loads(messages)
    return unpickled


class Seats:
    """One seat for each job. Only the engine's loop calls it."""

    def __init__(self, scheduler: TrainingScheduler) -> None:
        self._scheduler, self._software = scheduler, software()
        self._seats: dict[str, Seat] = {}
        self._outbox: list[tuple[str, FromEngine]] = []
        self._listener: Future[bytes] | None = None
        """Of the front end's `zo_hear` that has no answer yet."""

    def tell(self, messages: bytes) -> None:
        for job_id, message in unpacked(messages):
            if job_id not in self._seats:
                self._seats[job_id] = Seat(self._scheduler, self._software, self._sender(job_id))
            self._seats[job_id].take(message)

    def hear(self) -> Future[bytes]:
        listener = self._listener = Future[bytes]()
        self._deliver()
        return listener

    def _sender(self, job_id: str) -> Any:
        def send(message: FromEngine) -> None:
            self._outbox.append((job_id, message))
            self._deliver()

        return send

    def _deliver(self) -> None:
        if self._outbox and (listener := self._listener) is not None:
            messages, self._outbox, self._listener = self._outbox, [], None
            listener.set_result(packed(messages))


def software() -> str:
    """What computes in this process: engines of one job must have the same."""
    import vllm

    import vllm_zo

    return f"vllm {vllm.__version__}, vllm_zo {vllm_zo.__version__}"
