"""/v1/fine_tuning: rows for continual jobs, their versions, and feedback on their answers."""

from __future__ import annotations

import asyncio
import math
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from pydantic import BaseModel

from vllm_zo.entrypoints.server.context import ERRORS, service
from vllm_zo.entrypoints.server.http.errors import APIError, OpenAIRoute
from vllm_zo.entrypoints.server.http.schemas import Deleted
from vllm_zo.entrypoints.server.jobs.request import Strict
from vllm_zo.entrypoints.server.live.state import LiveState
from vllm_zo.validation import check_unicode

router = APIRouter(prefix="/v1/fine_tuning", route_class=OpenAIRoute, tags=["continual jobs"], responses=ERRORS)

BODY_BYTES = 16 << 20
"""Largest body of rows. More of them go into a file, which is uploaded first."""
JSONL = {"content": {"application/jsonl": {"schema": {"type": "string"}}}, "required": True}


class Appended(BaseModel):
    object: str
    id: str
    appended: int
    """Rows of this call; 0 if it was made before (`Idempotency-Key`)."""
    total: int
    """All rows that were appended to the job."""


class Versions(BaseModel):
    object: str
    data: list[dict[str, Any]]
    live: int | None
    canary: int | None
    canary_share: float
    held: bool


class Live(BaseModel):
    object: str = "fine_tuning.job.live"
    fine_tuning_job_id: str
    live: int | None
    canary: int | None
    held: bool


class FeedbackRequest(Strict):
    completion_id: str
    score: float | None = None
    label: str | int | float | None = None
    text: str | None = None


class FeedbackObject(BaseModel):
    id: str
    object: str
    created_at: int
    fine_tuning_job_id: str
    completion_id: str
    model: str
    score: float | None
    label: str | int | float | None
    text: str | None
    learnt: bool
    """Whether it made a row; a low score makes none."""


@router.post("/jobs/{job_id}/examples", response_model=Appended, openapi_extra={"requestBody": JSONL})
async def append_examples(
    request: Request, job_id: str, idempotency_key: Annotated[str | None, Header()] = None
) -> Any:
    """Append rows to a continual job: JSONL, or `{"file": "file-..."}`. All of them, or none."""
    return await service(request).growing.append_body(job_id, await request.body(), idempotency_key)


append_examples.body_limit = lambda request: BODY_BYTES  # type: ignore[attr-defined]


@router.get("/jobs/{job_id}/versions", response_model=Versions)
async def list_versions(request: Request, job_id: str) -> Any:
    """The versions of a continual job with their numbers and scores, and which of them are live and canary."""
    return await service(request).live.versions(job_id)


@router.post("/jobs/{job_id}/versions/{step}/promote", response_model=Live)
async def promote_version(request: Request, job_id: str, step: int) -> Any:
    """Let a version answer `live:<job id>` from the next request on, whatever the gate says."""
    return _shown(job_id, await service(request).live.promote(job_id, step))


@router.post("/jobs/{job_id}/versions/{step}/rollback", response_model=Live)
async def rollback_version(request: Request, job_id: str, step: int) -> Any:
    """Go back from the live version `step` to the one before it, and stay there until a version is promoted."""
    return _shown(job_id, await service(request).live.rollback(job_id, step))


@router.post("/feedback", response_model=FeedbackObject)
async def give_feedback(request: Request, body: FeedbackRequest) -> Any:
    """Say what an answer of a continual job was worth (`score`), or should have been (`label`, `text`)."""
    given = [name for name in ("score", "label", "text") if getattr(body, name) is not None]
    if len(given) != 1:
        raise APIError(400, f"feedback: give one of score, label and text, not {' and '.join(given) or 'none'}.")
    if body.score is not None and not math.isfinite(body.score):
        raise APIError(400, f"score={body.score}: expected a finite number.", "score")
    check_unicode("text", body.text)
    return await service(request).feedback.give(body.completion_id, score=body.score, label=body.label, text=body.text)


@router.get("/feedback/{feedback_id}", response_model=FeedbackObject)
async def retrieve_feedback(request: Request, feedback_id: str) -> Any:
    """Feedback as it was given."""
    return await asyncio.to_thread(service(request).feedback.find, feedback_id)


@router.delete("/feedback/{feedback_id}", response_model=Deleted)
async def delete_feedback(request: Request, feedback_id: str) -> Any:
    """Forget feedback, the answer that it was on, and the row that it made."""
    await service(request).feedback.delete(feedback_id)
    return {"id": feedback_id, "object": "fine_tuning.feedback", "deleted": True}


def _shown(job_id: str, live: LiveState) -> dict[str, Any]:
    return {"fine_tuning_job_id": job_id, "live": live.step, "canary": live.canary, "held": live.held}
