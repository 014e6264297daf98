"""/v1/fine_tuning/alpha/graders: try a grader before a job uses it."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from vllm_zo.entrypoints.openai.errors import OpenAIRoute
from vllm_zo.entrypoints.openai.job_request import Strict
from vllm_zo.entrypoints.openai.service import ERRORS, service
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
def validate_grader(request: Request, body: ValidateRequest) -> Any:
    """Whether a grader can be used; what is wrong with it is a 400."""
    build_grader(body.grader, allow_python=service(request).settings.allow_python_graders)
    return {"grader": body.grader}


@router.post("/run", response_model=RunResponse)
def run_grader(request: Request, body: RunRequest) -> Any:
    """The reward of one text."""
    grader = build_grader(body.grader, allow_python=service(request).settings.allow_python_graders)
    start = time.monotonic()
    result = grader(body.model_sample, body.item)
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
