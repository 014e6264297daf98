"""Lets a program behind a URL play: it is posted the row and the rollout's address, and answers with a score.

Request and answer are JSON:

    POST url   {"row": {...}, "base_url": "http://.../v1", "model": "probe:...", "seed": 1234}
    200        {"score": 0.5}

A header `Idempotency-Key` is the same for every try of one rollout. With the environment variable
VLLM_ZO_ROLLOUT_SECRET, the header `X-VLLM-ZO-Signature` is "t=<unix seconds>,v1=<hex>", where hex is the HMAC-SHA256 of
"<unix seconds>.<body>" under the secret: the receiver can tell who asks, and refuse an old request.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import time
from typing import Any

import httpx

from vllm_zo.entrypoints.llm.rollouts.opened import OpenedRollout
from vllm_zo.objectives import Rollout

SECRET = "VLLM_ZO_ROLLOUT_SECRET"
TRIES, FIRST_PAUSE_S = 4, 0.5
"""The pause between two tries doubles each time."""
TRY_AGAIN = (429, 502, 503, 504)
"""Statuses of a server that may answer later."""
MAX_ANSWER = 64 << 10
"""Most bytes of an answer."""


class RemoteProgram:
    """Plays rollouts by posting them to the objective's URL. It belongs to one event loop.

    Args:
        server: address at which the program finds the rollouts' server, without a path.
    """

    def __init__(self, objective: Rollout, server: str) -> None:
        assert objective.url is not None
        self._url, self._server = objective.url, server
        self._secret = os.environ.get(SECRET, "").encode()
        # No redirects (httpx's default) and no proxy of the environment: the request goes where the job says, and the
        # server allows, or nowhere. A rollout may take its whole time to answer.
        limits = httpx.Limits(max_connections=objective.concurrency)
        timeout = httpx.Timeout(objective.timeout_s, connect=min(10.0, objective.timeout_s))
        self._http = httpx.AsyncClient(trust_env=False, limits=limits, timeout=timeout)

    async def play(self, rollout: OpenedRollout, row: dict[str, Any]) -> Any:
        """The score that the program answers.

        Raises:
            RuntimeError: it answers something else, or its server cannot be reached.
        """
        asked = {
            "row": row,
            "base_url": f"{self._server}{rollout.address}",
            "model": rollout.model,
            "seed": rollout.seed % (1 << 53),  # a number that every JSON reader keeps exactly
        }
        body = json.dumps(asked).encode()
        for number in range(TRIES):
            if number:
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (number - 1))
            rollout.begin_again()
            try:
                status, answer = await self._post(body, rollout.token)
            except httpx.TransportError as error:
                why = f"{self._url} cannot be reached: {type(error).__name__}: {error}"
                continue
            if status not in TRY_AGAIN:
                return self._score(status, answer)
            why = f"{self._url} answered {status}"
        raise RuntimeError(f"{why} ({TRIES} tries)")

    async def _post(self, body: bytes, key: str) -> tuple[int, bytes]:
        # The rollout's token is the key to its probe, so the header has a digest of it.
        headers = {"Content-Type": "application/json", "Idempotency-Key": hashlib.sha256(key.encode()).hexdigest()}
        if self._secret:
            headers["X-VLLM-ZO-Signature"] = signature(self._secret, body, int(time.time()))
        async with self._http.stream("POST", self._url, content=body, headers=headers) as response:
            answer = b""
            async for part in response.aiter_bytes():
                answer += part
                if len(answer) > MAX_ANSWER:
                    raise RuntimeError(f"{self._url} answered more than {MAX_ANSWER} bytes")
            return response.status_code, answer

    def _score(self, status: int, answer: bytes) -> Any:
        shown = answer[:80].decode(errors="replace")
        if 300 <= status < 400:
            raise RuntimeError(f"{self._url} answered {status}: redirects are not followed")
        if status != 200:
            raise RuntimeError(f"{self._url} answered {status}: {shown}")
        try:
            return json.loads(answer)["score"]
        except (ValueError, TypeError, KeyError):
            raise RuntimeError(f'{self._url} answered {shown!r}: expected {{"score": a number}}') from None

    async def close(self) -> None:
        await self._http.aclose()


def signature(secret: bytes, body: bytes, now: int) -> str:
    """The value of the header `X-VLLM-ZO-Signature`."""
    return f"t={now},v1={hmac.new(secret, b'%d.%b' % (now, body), hashlib.sha256).hexdigest()}"
