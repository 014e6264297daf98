"""Errors in the form that OpenAI clients know, and the limit on request bodies. Both belong to our routes, and work in
any app that has these routes."""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from vllm_zo.errors import ConfigError, ZOError
from vllm_zo.validation import check_json

Result = TypeVar("Result")

logger = logging.getLogger("vllm.zo.server")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "server_error",
    507: "server_error",
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITTEN = ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_SHMMAP")
"""SQLite's names for a disk that takes no more. Only the first is ENOSPC; a quota that is used up is one of the others.
A commit that ends like this is undone and may be tried again."""
FULL_DISK_WAIT_S = 1.0
MAX_JSON_BYTES = 1 << 20
"""Largest JSON body. A create request with a grader in it has a few KB. Parsing a body, and listing the jobs made of
it, holds the interpreter lock, so a larger one would delay every other request."""


class APIError(ZOError):
    """An error answer.

    Args:
        param: the field of the request that the client should change.
        code: for programs; e.g. "model_not_found".
        type: OpenAI's word for the kind of error; None: the one of the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or TYPES[status]

    def response(self) -> JSONResponse:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, status_code=self.status)


class OpenAIRoute(APIRoute):
    """A route that answers errors in OpenAI's envelope and limits the size of request bodies.

    The handling is here and not in the app's exception handlers: vLLM sets its own for the whole app.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            # FastAPI has no limit on a body of its own; an upload's route sets `body_limit` on its function.
            limit = getattr(self.endpoint, "body_limit", _json_limit)(request)
            limited = _CheckedRequest(request.scope, _limited(request, limit))
            try:
                return await handle(limited)
            except APIError as error:
                return error.response()
            except ConfigError as error:
                return APIError(400, str(error)).response()
            except RequestValidationError as error:
                return _invalid(error).response()
            except HTTPException as error:
                # FastAPI raises a 400 for any error while it reads a body, the 413 of `_limited` too.
                match error.__cause__ or error.__context__:
                    case APIError() as cause:
                        return cause.response()
                    case ConfigError() as cause:
                        return APIError(400, str(cause)).response()
                    case OSError() as cause if (answer := disk_error(cause)) is not None:  # of temporary files
                        logger.error("%s %s: %s", request.method, request.url.path, cause)
                        return answer.response()
                return APIError(error.status_code if error.status_code in TYPES else 400, str(error.detail)).response()
            except RecursionError:
                return APIError(400, "The request nests values too deeply.").response()
            except ClientDisconnect:
                return Response(status_code=400)  # the client is gone: this only keeps a traceback out of the log
            except (OSError, sqlite3.OperationalError) as error:
                if (answer := disk_error(error)) is None:
                    raise
                logger.error("%s %s: %s", request.method, request.url.path, error)
                return answer.response()

        return handler


class _CheckedRequest(Request):
    """A request whose JSON body holds only what an answer can hold. What a client sends is stored and shown to all
    clients: half a character in one job would make every list of jobs an error."""

    async def json(self) -> Any:
        """The body. Raises ConfigError: see `check_json`; JSONDecodeError: it is no JSON."""
        value = await super().json()
        check_json("request", value)
        return value


def disk_error(error: Exception) -> APIError | None:
    """The answer 507 if the error comes from a full disk or a quota that is used up, else None."""
    full = isinstance(error, OSError) and error.errno in DISK_FULL
    if full or getattr(error, "sqlite_errorname", None) in NOT_WRITTEN:
        return APIError(507, "The server's disk is full; nothing was changed. Free space, then try again.")
    return None


async def when_there_is_room(act: Callable[[], Awaitable[Result]], on_full: Callable[[], None] | None = None) -> Result:
    """Call `act` again and again while the disk is full: what a job has done must be written down, however late.

    Args:
        on_full: called after each try that found the disk full.
    """
    while True:
        try:
            return await act()
        except (OSError, sqlite3.OperationalError) as error:
            if disk_error(error) is None:
                raise
            logger.error("the disk is full; trying again in %g s: %s", FULL_DISK_WAIT_S, error)
            if on_full is not None:
                on_full()
            await asyncio.sleep(FULL_DISK_WAIT_S)


def _json_limit(request: Request) -> int:
    return MAX_JSON_BYTES


def _limited(request: Request, limit: int) -> Receive:
    """A receive function for the body of a request. It raises APIError (413) if the body is longer than `limit` bytes.

    The declared length saves reading a long body; counting catches one that declares none, or too little.
    """
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
    """The answer to an invalid request: the first error, by the name of its field."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]  # without "body" or "query"
    name = ".".join(where)
    # For these the input says nothing: it is the object around the field, an unknown field's value, or empty.
    given = "" if first["type"] in ("missing", "extra_forbidden", "json_invalid") else f"={first.get('input')!r:.80}"
    message = "unknown field" if first["type"] == "extra_forbidden" else str(first["msg"])
    return APIError(400, f"{name or 'request'}{given}: {message}.", name or None)
