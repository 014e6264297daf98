"""Stands around vLLM's completion routes for continual jobs: sends a share of requests to a canary, and keeps answers
that clients may give feedback on. All other requests pass through it unchanged."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_zo.entrypoints.llm.rollouts.gate import replay
from vllm_zo.entrypoints.server.context import Service
from vllm_zo.entrypoints.server.http.paths import route_path
from vllm_zo.entrypoints.server.live.answers import CHATS, COMPLETIONS

OURS = ("job:", "live:", "ft:")
MAX_ANSWER_BYTES = 1 << 22
"""A longer answer is not kept."""
END = b"data: [DONE]\n\n"
"""The end of a streamed answer."""


class LiveGate:
    """ASGI middleware. vLLM's key check stands around it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        if scope["type"] != "http" or scope["method"] != "POST" or path not in (COMPLETIONS, CHATS):
            await self.app(scope, receive, send)
            return
        zo: Service | None = getattr(scope["app"].state, "zo", None)
        if zo is None or not (zo.live.has_canaries or zo.feedback.any):
            await self.app(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        asked = _parsed(body)
        model = str(asked.get("model"))
        if not model.startswith(OURS) or not zo.serving.serves(model):  # the second: another project's
            await self.app(scope, replay(body, receive), send)
            return
        if (chosen := zo.live.choose(model)) != model:
            body = json.dumps({**asked, "model": chosen}).encode()
            length = (b"content-length", str(len(body)).encode())
            scope = {**scope, "headers": [*(h for h in scope["headers"] if h[0] != length[0]), length]}
        if (job_id := zo.feedback.job_of(model)) is not None:

            async def keep(answer: bytes) -> None:
                await zo.feedback.keep(job_id, path, asked, answer)

            send = _Answer(send, keep).send
        await self.app(scope, replay(body, receive), send)


class _Answer:
    """Passes an answer on. A good one is kept before its end goes out: feedback may come right after that.

    A client reads a stream no further than `END`, and one more part follows it.
    """

    def __init__(self, send: Send, keep: Callable[[bytes], Awaitable[None]]) -> None:
        self._send, self._keep = send, keep
        self._body = bytearray()
        self._good = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._good = message["status"] == 200
        elif self._good:
            self._body += message.get("body", b"")
            if len(self._body) > MAX_ANSWER_BYTES:
                self._good, self._body = False, bytearray()
            elif not message.get("more_body", False) or self._body.endswith(END):
                self._good = False
                await self._keep(bytes(self._body))
        await self._send(message)


def _parsed(body: bytes) -> dict[str, Any]:
    """The request; empty where vLLM's own routes will say what is wrong with it."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return asked if isinstance(asked, dict) else {}
