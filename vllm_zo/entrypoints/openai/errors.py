"""Errors as OpenAI clients know them, and the limit on request bodies: for our routes, in whatever app they are."""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from vllm_zo.errors import ConfigError, ZOError

Result = TypeVar("Result")

logger = logging.getLogger("vllm.zo.server")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    501: "not_implemented_error",
    503: "server_error",
    507: "server_error",
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_DISK_WAIT_S = 1.0
MAX_JSON_BYTES = 4 << 20
"""A create request with a grader in it is a few KB."""


class APIError(ZOError):
    """An answer other than success.

    Args:
        param: the field of the request that is to be changed.
        code: for programs; e.g. "model_not_found".
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self) -> JSONResponse:
        error = {"message": self.message, "type": TYPES[self.status], "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, status_code=self.status)


class OpenAIRoute(APIRoute):
    """A route whose errors come in OpenAI's envelope and whose request bodies are limited."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            limit = getattr(self.endpoint, "body_limit", _json_limit)(request)
            limited = Request(request.scope, _limited(request, limit))
            try:
                return await handle(limited)
            except APIError as error:
                return error.response()
            except ConfigError as error:
                return APIError(400, str(error)).response()
            except RequestValidationError as error:
                return _invalid(error).response()
            except HTTPException as error:
                if (cause := error.__cause__ or error.__context__) and isinstance(cause, APIError):
                    return cause.response()  # FastAPI turns what goes wrong while it reads a body into a 400
                return APIError(error.status_code if error.status_code in TYPES else 400, str(error.detail)).response()
            except ClientDisconnect:
                return Response(status_code=400)
            except (OSError, sqlite3.OperationalError) as error:
                if (answer := disk_error(error)) is None:
                    raise
                logger.error("%s %s: %s", request.method, request.url.path, error)
                return answer.response()

        return handler


def disk_error(error: Exception) -> APIError | None:
    """507 for a full disk, else None."""
    full = isinstance(error, OSError) and error.errno in DISK_FULL
    if full or (isinstance(error, sqlite3.OperationalError) and "full" in str(error)):
        return APIError(507, "The server's disk is full; nothing was changed. Free space, then try again.")
    return None


async def when_there_is_room(write: Callable[[], Result]) -> Result:
    """Call `write` in a thread, again and again while the disk is full: what has happened must be written down."""
    while True:
        try:
            return await asyncio.to_thread(write)
        except (OSError, sqlite3.OperationalError) as error:
            if disk_error(error) is None:
                raise
            logger.error("the disk is full; trying again in %g s: %s", FULL_DISK_WAIT_S, error)
            await asyncio.sleep(FULL_DISK_WAIT_S)


def _json_limit(request: Request) -> int:
    return MAX_JSON_BYTES


def _limited(request: Request, limit: int) -> Receive:
    """The body of a request, refused as soon as it is known to be longer than `limit` bytes."""
    declared = request.headers.get("content-length", "")
    received = 0

    async def receive() -> Message:
        nonlocal received
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_large(limit)
        return message

    return receive


def _too_large(limit: int) -> APIError:
    return APIError(413, f"The request is larger than the limit of {limit >> 20} MiB.", "file", "too_large")


def _invalid(error: RequestValidationError) -> APIError:
    """The first thing that is wrong with a request, by the name of its field."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]
    name = ".".join(where)
    given = "" if first["type"] in ("missing", "extra_forbidden", "json_invalid") else f"={first.get('input')!r:.80}"
    message = "unknown field" if first["type"] == "extra_forbidden" else str(first["msg"])
    return APIError(400, f"{name or 'request'}{given}: {message}.", name or None)
