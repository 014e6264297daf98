"""The addresses of rollouts: each leads to vLLM's own routes, for one probe and with seeds of its own.

All probes of a row must draw the same random numbers, and a program that plays knows nothing of that. So the gate puts
the seed of (job, step, row, turn) into every request that brings none.
"""

from __future__ import annotations

import json
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_zo.commands import PROBE_NAME
from vllm_zo.entrypoints.llm.rollouts.opened import PREFIX, OpenedRollout, OpenedRollouts
from vllm_zo.entrypoints.llm.rollouts.transcripts import MAX_ANSWER, Transcript

SAMPLED = ("/v1/chat/completions", "/v1/completions")
"""Routes whose requests take a `seed`."""
OTHERS = ("/v1/responses", "/v1/models", "/tokenize", "/detokenize")
"""Further routes that a rollout may use. Its address opens no other: whoever has it needs no API key."""


class RolloutGate:
    """ASGI middleware; it has to stand around all others, because it gives them another path.

    Requests for any other path pass through it unchanged.

    Args:
        key: the API key that vLLM's middleware asks for, if it stands behind this one. Nobody can guess the address of
            a rollout, which lives as long as the rollout: it is the key to its probe.
    """

    def __init__(self, app: ASGIApp, opened: OpenedRollouts, key: str | None = None) -> None:
        self._app, self._opened, self._key = app, opened, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(PREFIX):
            try:
                scope, receive, send = await self._behind(scope, receive, send)
            except _Refused as refused:
                await refused.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _behind(self, scope: Scope, receive: Receive, send: Send) -> tuple[Scope, Receive, Send]:
        """The request as vLLM's routes are to see it, and where they send their answer."""
        token, slash, rest = scope["path"].removeprefix(PREFIX).partition("/")
        path, rollout = slash + rest, self._opened.find(token)
        if rollout is None:
            raise _Refused("This rollout has ended: it was answered, failed or timed out, or its step was cancelled.")
        if path not in (*SAMPLED, *OTHERS):
            raise _Refused(f"{path}: a rollout only asks models, at {', '.join((*SAMPLED, *OTHERS))}.")
        headers = dict(scope["headers"])
        if self._key is not None:
            headers[b"authorization"] = f"Bearer {self._key}".encode()
        if path in SAMPLED and scope["method"] == "POST":
            body = _prepared(await Request(scope, receive).body(), rollout)
            headers[b"content-length"] = str(len(body)).encode()
            receive = replay(body, receive)
            if rollout.transcript is not None:
                send = _noted(body, rollout.transcript, send)
        return {**scope, "path": path, "raw_path": path.encode(), "headers": list(headers.items())}, receive, send


class _Refused(Exception):
    """The answer to a request that no route gets."""

    def response(self) -> JSONResponse:
        status = HTTPStatus.NOT_FOUND.value
        error = {"message": str(self), "type": "NotFoundError", "param": "model", "code": status}
        return JSONResponse({"error": error}, status)


def _prepared(body: bytes, rollout: OpenedRollout) -> bytes:
    """The body with a model and a seed. Raises _Refused: it asks for another probe."""
    try:
        asked: Any = json.loads(body)
    except ValueError:
        return body  # vLLM's own routes say what is wrong with it
    if not isinstance(asked, dict):
        return body
    # Without a model vLLM would answer for the base, and the rollout would say nothing of its probe.
    asked.setdefault("model", rollout.model)
    if str(asked["model"]).startswith(PROBE_NAME) and asked["model"] != rollout.model:
        raise _Refused(f"The model of this rollout is {rollout.model!r}, not {asked['model']!r}.")
    seed = rollout.next_seed()
    if asked.get("seed") is None:
        asked["seed"] = seed
    return json.dumps(asked).encode()


def _noted(body: bytes, transcript: Transcript, send: Send) -> Send:
    """`send` that also tells a transcript what was asked and answered."""
    answer = b""

    async def noting(message: Message) -> None:
        nonlocal answer
        if message["type"] == "http.response.body":
            if len(answer) < MAX_ANSWER:
                answer += message.get("body", b"")
            if not message.get("more_body", False):
                with suppress(ValueError):  # a body that is no JSON: vLLM's routes have said so
                    if isinstance(asked := json.loads(body), dict):
                        transcript.turn(asked, answer)
        await send(message)

    return noting


def replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for a body that has been read. What comes after it (the client is gone) is the connection's own."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
