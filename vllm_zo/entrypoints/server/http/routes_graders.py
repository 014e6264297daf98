"""/v1/fine_tuning/alpha/graders: try a grader before a job uses it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from vllm_zo.entrypoints.server.context import ERRORS, service
from vllm_zo.entrypoints.server.http.errors import APIError, OpenAIRoute
from vllm_zo.entrypoints.server.jobs.request import Strict
from vllm_zo.objectives.graders import build_grader

router = APIRouter(prefix="/v1/fine_tuning/alpha/graders", route_class=OpenAIRoute, tags=["graders"], responses=ERRORS)

ERROR_FLAGS = (
    "formula_parse_error", "sample_parse_error", "truncated_observation_error", "unresponsive_reward_error",
    "invalid_variable_error", "other_error", "python_grader_server_error", "python_grader_runtime_error",
    "model_grader_server_error", "model_grader_refusal_error", "model_grader_parse_error",
)  # fmt: skip
DETAILED = {
    "python_grader_runtime_error": "python_grader_runtime_error_details",
    "python_grader_server_error": "python_grader_server_error_type",
}


MAX_WAITING = 64
"""Most requests that run or wait for a thread. Others are answered 503."""


class _Workers:
    """Threads for graders only. A grader may take 40 s, and the other work that the server does in threads must not
    wait for it."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="zo-grader")
        self._taken = 0

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._taken >= MAX_WAITING:
            raise APIError(503, "Too many graders are running; try again later.")
        self._taken += 1  # without a lock: only the event loop changes it, and nothing awaits since the check
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        finally:
            self._taken -= 1


_workers = _Workers()


class ValidateRequest(Strict):
    grader: dict[str, Any]


class RunRequest(Strict):
    grader: dict[str, Any]
    model_sample: str
    item: dict[str, Any] = Field(default_factory=dict)


class ValidateResponse(BaseModel):
    grader: dict[str, Any]


class RunResponse(BaseModel):
    reward: float
    sub_rewards: dict[str, float]
    model_grader_token_usage_per_model: dict[str, Any] = {}
    metadata: dict[str, Any]


@router.post("/validate", response_model=ValidateResponse)
async def validate_grader(request: Request, body: ValidateRequest) -> Any:
    """Check a grader. One that cannot be used is answered 400 with the reason."""
    allowed = service(request).settings.allow_python_graders
    # In a thread as well: a client's formula or pattern may take long to compile.
    await _workers.run(build_grader, body.grader, allowed)
    return {"grader": body.grader}


@router.post("/run", response_model=RunResponse)
async def run_grader(request: Request, body: RunRequest) -> Any:
    """The reward of one text."""
    allowed = service(request).settings.allow_python_graders
    grader = await _workers.run(build_grader, body.grader, allowed)
    start = time.monotonic()
    result = await _workers.run(grader, body.model_sample, body.item)
    errors: dict[str, Any] = {flag: flag in result.errors for flag in ERROR_FLAGS}
    errors |= {name: result.errors.get(flag) for flag, name in DETAILED.items()}
    errors["model_grader_server_error_details"] = None
    metadata = {
        "name": body.grader["name"],
        "type": body.grader["type"],
        "errors": errors,
        "execution_time": time.monotonic() - start,
        "scores": result.sub_rewards,
        "token_usage": None,
        "sampled_model_name": None,
    }
    return {"reward": result.reward, "sub_rewards": result.sub_rewards, "metadata": metadata}
