"""While a `fold` job changes the base weights, the server answers 409 to every other request that uses the model.

The engine refuses such requests too, but vLLM's routes have no answer for a refusal.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_zo.entrypoints.server.context import Service
from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.http.paths import route_path
from vllm_zo.entrypoints.server.keys.current import current_project

OURS = ("/v1/files", "/v1/fine_tuning", "/v1/models")
"""Routes that stay open meanwhile: a client must be able to follow and cancel the job."""


class FoldGuard:
    """ASGI middleware. vLLM's key check stands around it, so a client without a key learns nothing of jobs.

    It is no BaseHTTPMiddleware: that would pass streamed answers through a queue of its own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (job_id := await self._alone(Request(scope))) is not None:
            which = "A job" if current_project() is not None else f"Job {job_id}"
            error = APIError(
                409,
                f"{which} (update_space='fold') is changing the base weights: no other request is served until "
                "it has ended.",
                code="engine_exclusive",
            )
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _alone(self, request: Request) -> str | None:
        """The `fold` job that the request would disturb, or None."""
        # None until `init_state` has run.
        zo: Service | None = getattr(request.app.state, "zo", None)
        path = route_path(request.scope)
        uses_model = request.method == "POST" and not path.startswith(OURS)
        return await zo.runner.alone() if zo is not None and uses_model else None
