"""The middleware around everything else of a server with `--zo-keys`: who asks, for which project, may they.

A project's key opens the routes of `OF_PROJECTS`. The operator's (`--api-key`) opens all. Without a key there is only
what `WITHOUT_KEY` names: `/metrics` shows every project's jobs, so it takes the operator's key.
"""

from __future__ import annotations

import asyncio
import logging
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_zo.entrypoints.llm.rollouts.opened import PREFIX
from vllm_zo.entrypoints.server.context import Service
from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.http.paths import route_path
from vllm_zo.entrypoints.server.keys.current import OPERATOR, acting_for
from vllm_zo.entrypoints.server.keys.key_file import Key
from vllm_zo.entrypoints.server.keys.key_ring import KeyRing

logger = logging.getLogger("vllm.zo.audit")

OPERATORS = Key("operator", OPERATOR, "", 0)
"""Stands for `--api-key` in audit lines."""

WITHOUT_KEY = re.compile(r"/(health|ping|version|fine-tuning)")
"""Nothing of a project is in their answers. The page asks for a key itself."""
OF_PROJECTS = {
    "GET": re.compile(r"/v1/(files|fine_tuning|models)(/[\s\S]*)?"),
    "DELETE": re.compile(r"/v1/(files|fine_tuning|models)/[\s\S]*"),
    "POST": re.compile(
        r"/v1/(files|fine_tuning)(/[\s\S]*)?|/v1/(completions|chat/completions|responses|messages|embeddings)"
        r"|/(tokenize|detokenize)"
    ),
}
"""Method -> paths. Only these: others of vLLM's routes load adapters, sleep the engine, or answer for all projects."""


class ProjectGate:
    """ASGI middleware. It must stand around vLLM's own key check, to which it shows the operator's key for a project's.

    Below it the current project (current.py) is set, and the store and the table of adapters answer accordingly.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # None until `init_state` has run.
        zo: Service | None = getattr(scope["app"].state, "zo", None) if scope["type"] != "lifespan" else None
        if zo is None or (keys := zo.keys) is None:
            await self.app(scope, receive, send)
            return
        path = route_path(scope)
        method = scope.get("method", "WEBSOCKET")
        secret = _secret(Headers(scope=scope))
        if path.startswith(PREFIX):  # whatever key its program sends: the address is the key
            with acting_for(self._of_rollout(zo, path)):
                await self.app(scope, receive, send)
        elif keys.is_operators(secret):
            await self._audited(OPERATORS, scope, receive, send)
        elif (key := keys.find(secret)) is not None:
            with acting_for(key.project):
                await self._for_project(zo, keys, key, method, path, scope, receive, send)
        elif method == "OPTIONS" or WITHOUT_KEY.fullmatch(path):
            await self.app(scope, receive, send)
        else:
            why = "Incorrect API key provided." if secret else "You didn't provide an API key (Authorization: Bearer)."
            await self._refuse(APIError(401, why, code="invalid_api_key"), None, {}, scope, receive, send)

    def _of_rollout(self, zo: Service, path: str) -> str | None:
        """The project whose rollout has this address: its program sees what the project sees."""
        rollout = zo.rollouts.opened.find(path.removeprefix(PREFIX).partition("/")[0])
        # Of no rollout: its gate refuses it, whoever asks.
        return (zo.serving.owner(rollout.model) or None) if rollout is not None else None

    async def _for_project(
        self, zo: Service, keys: KeyRing, key: Key, method: str, path: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        headers, refused = await asyncio.to_thread(zo.quotas.take_request)  # it reads the store
        allowed = OF_PROJECTS.get("GET" if method == "HEAD" else method)
        if refused is None and (allowed is None or not allowed.fullmatch(path)):
            refused = APIError(404, f"Invalid URL ({method} {path})", code="unknown_url")
        if refused is not None:
            await self._refuse(refused, key, headers, scope, receive, send)
            return
        # vLLM's check knows the operator's keys only.
        shown = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
        shown.append((b"authorization", f"Bearer {keys.operator}".encode()))
        await self._audited(key, {**scope, "headers": shown}, receive, _adding(headers, send))

    async def _refuse(
        self, error: APIError, key: Key | None, headers: dict[str, str], scope: Scope, receive: Receive, send: Send
    ) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the client sees a 403
        else:
            await error.response()(scope, receive, _adding(headers, send))
        _audit(key, scope, error.status)

    async def _audited(self, key: Key, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, and log it if it may have changed something."""
        status = 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            path = route_path(scope)
            if scope["type"] == "http" and scope["method"] in ("POST", "DELETE") and _is_ours(path):
                _audit(key, scope, status)


def _is_ours(path: str) -> bool:
    return path.startswith(("/v1/files", "/v1/fine_tuning", "/v1/models"))


def _audit(key: Key | None, scope: Scope, status: int) -> None:
    """One line: who, what, and what came of it. A route that makes something has left its id in the request's state."""
    client = (scope.get("client") or ("?",))[0]
    made = getattr(Request(scope).state, "made", "-") if scope["type"] == "http" else "-"
    logger.info(
        "project=%s key=%s client=%s %s %r status=%d made=%s",
        (key.project if key is not None else "") or "-",
        key.id if key is not None else "-",
        client,
        scope.get("method", "WEBSOCKET"),
        scope["path"],
        status,
        made,
    )


def _secret(headers: Headers) -> str:
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


def _adding(headers: dict[str, str], send: Send) -> Send:
    """`send` with these headers on the answer."""

    async def adding(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer = MutableHeaders(raw=message.setdefault("headers", []))
            for name, value in headers.items():
                answer[name] = value
        await send(message)

    return adding
