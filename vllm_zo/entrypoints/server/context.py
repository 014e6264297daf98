"""Everything that the routes work with, and how they find it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request

from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.http.events import EventHub
from vllm_zo.entrypoints.server.http.schemas import ErrorEnvelope
from vllm_zo.entrypoints.server.jobs.rollouts import ServedRollouts
from vllm_zo.entrypoints.server.jobs.runner import JobRunner
from vllm_zo.entrypoints.server.keys.key_ring import KeyRing
from vllm_zo.entrypoints.server.keys.limits import Quotas
from vllm_zo.entrypoints.server.live.examples import GrowingJobs
from vllm_zo.entrypoints.server.live.feedback import Feedback
from vllm_zo.entrypoints.server.live.versions import LiveVersions
from vllm_zo.entrypoints.server.models.names import ModelNames
from vllm_zo.entrypoints.server.models.vllm_models import Serving
from vllm_zo.entrypoints.server.settings import ServerSettings
from vllm_zo.entrypoints.server.state.directory import StateDir
from vllm_zo.entrypoints.server.state.files import Files
from vllm_zo.entrypoints.server.state.store import Store

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope} for status in (400, 401, 403, 404, 409, 413, 422, 429, 503, 507)
}
"""For OpenAPI: the error statuses that every route may answer, all in one envelope."""


@dataclass
class Service:
    """The objects behind the routes. The plugin makes it and puts it into the app's state."""

    settings: ServerSettings
    state: StateDir
    store: Store
    files: Files
    hub: EventHub
    serving: Serving
    names: ModelNames
    runner: JobRunner
    growing: GrowingJobs
    live: LiveVersions
    feedback: Feedback
    rollouts: ServedRollouts
    quotas: Quotas
    keys: KeyRing | None
    """None: no `--zo-keys`, so there are no projects."""


def service(request: Request) -> Service:
    """The service of the app that a request came to.

    Raises:
        APIError: 503, the plugin has not made it yet.
    """
    found: Service | None = getattr(request.app.state, "zo", None)
    if found is None:
        raise APIError(503, "The training server is not ready.")
    return found
