"""The project for which the server does something now. None: the operator, who sees everything.

A context variable: it goes with a request into vLLM's routes and into threads, and no function on the way has to pass
it on. The task of a job runs for the operator (runner.py), whoever has created the job.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

OPERATOR = ""
"""The owner of what the operator has made, with `--api-key` or on a server without projects."""

_current: ContextVar[str | None] = ContextVar("vllm_zo_project", default=None)


def current_project() -> str | None:
    return _current.get()


@contextmanager
def acting_for(project: str | None) -> Iterator[None]:
    """In the block, and in what is called or started in it, the current project is `project`."""
    token = _current.set(project)
    try:
        yield
    finally:
        _current.reset(token)
