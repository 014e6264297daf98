"""While a `fold` job changes the base weights, everything else that would use the model gets a clear 409."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_zo.entrypoints.openai.errors import APIError
from vllm_zo.entrypoints.openai.service import Service

OURS = ("/v1/files", "/v1/fine_tuning", "/v1/models")


class FoldGuard:
    """Middleware; vLLM's key check stands in front of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (job_id := self._alone(Request(scope))) is not None:
            error = APIError(
                409,
                f"Job {job_id} (update_space='fold') is changing the base weights: no other request is served until "
                "it has ended.",
                code="engine_exclusive",
            )
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _alone(self, request: Request) -> str | None:
        """The job in whose way the request would be."""
        zo: Service | None = getattr(request.app.state, "zo", None)
        uses_model = request.method == "POST" and not request.url.path.startswith(OURS)
        return zo.runner.turns.alone if zo is not None and uses_model else None
