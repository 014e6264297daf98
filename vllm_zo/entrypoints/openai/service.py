"""Everything that the routes work with, and how they find it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request

from vllm_zo.entrypoints.openai.errors import APIError
from vllm_zo.entrypoints.openai.events import EventHub
from vllm_zo.entrypoints.openai.models import ModelNames
from vllm_zo.entrypoints.openai.runner import JobRunner
from vllm_zo.entrypoints.openai.serving import Serving
from vllm_zo.entrypoints.openai.settings import ServerSettings
from vllm_zo.entrypoints.openai.state_dir import StateDir
from vllm_zo.entrypoints.openai.store import Store
from vllm_zo.entrypoints.openai.uploads import Files
from vllm_zo.entrypoints.openai.wire import ErrorEnvelope

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope} for status in (400, 401, 404, 409, 413, 422, 501, 507)
}
"""For OpenAPI: every route may answer these, in one envelope."""


@dataclass
class Service:
    settings: ServerSettings
    state: StateDir
    store: Store
    files: Files
    hub: EventHub
    serving: Serving
    names: ModelNames
    runner: JobRunner


def service(request: Request) -> Service:
    """The service of the app that a request came to."""
    found: Service | None = getattr(request.app.state, "zo", None)
    if found is None:
        raise APIError(503, "The training server is not ready.")
    return found
