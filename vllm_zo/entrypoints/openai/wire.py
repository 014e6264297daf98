"""The objects that clients see, as the OpenAI SDK parses them. Times are whole Unix seconds."""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel

VALIDATING, QUEUED, RUNNING = "validating_files", "queued", "running"
PAUSING, PAUSED = "pausing", "paused"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
FINAL = (SUCCEEDED, FAILED, CANCELLED)
UNFINISHED = (VALIDATING, QUEUED, RUNNING, PAUSING, PAUSED)


def new_id(prefix: str) -> str:
    """An id that nobody guesses and that is safe as the name of a file."""
    return f"{prefix}{secrets.token_hex(12)}"


def now() -> int:
    return int(time.time())


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str = "processed"
    expires_at: int | None = None
    status_details: str | None = None


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Deleted(BaseModel):
    id: str
    object: str
    deleted: bool


class JobError(BaseModel):
    code: str
    message: str
    param: str | None = None


class Job(BaseModel):
    """`hyperparameters` has every value the job runs with, "auto" resolved."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None = None
    estimated_finish: int | None = None
    model: str
    fine_tuned_model: str | None = None
    organization_id: str
    status: str
    error: JobError | None = None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    training_file: str
    validation_file: str | None = None
    result_files: list[str] = []
    trained_tokens: int | None = None
    seed: int
    integrations: list[dict[str, Any]] = []
    metadata: dict[str, str] | None = None
    suffix: str | None = None
    step: int = 0
    total_steps: int = 0


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Job]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Event(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None = None


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Event]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Checkpoint(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float | None]


class CheckpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Checkpoint]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Permissions(BaseModel):
    """Always empty: checkpoints are shared by everybody who has a key."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]] = []
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorEnvelope(BaseModel):
    error: ErrorBody


def listing(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page of a list, with the cursors that the SDK follows."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "has_more": has_more, "first_id": first, "last_id": last}


def event(message: str, level: str = "info", data: dict[str, Any] | None = None) -> dict[str, Any]:
    """A new event: of type "metrics" where there are numbers."""
    kind = "message" if data is None else "metrics"
    return {
        "id": new_id("ftevent-"),
        "object": "fine_tuning.job.event",
        "created_at": now(),
        "level": level,
        "message": message,
        "type": kind,
        "data": data,
    }
