"""The objects that clients see, in the form that the OpenAI SDK parses. Times are whole Unix seconds."""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel

from vllm_zo.jobs.status import JobStatus


def new_id(prefix: str) -> str:
    """A random id. Clients cannot guess it, and it is safe as the name of a file."""
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
    """A fine-tuning job. `hyperparameters` has every value that the job runs with, in place of "auto"."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None = None
    estimated_finish: int | None = None
    model: str
    fine_tuned_model: str | None = None
    organization_id: str
    status: JobStatus
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


class Transcripts(BaseModel):
    """Each is {"step", "rollouts": [{"row", "reward", "error", "said": [{"role", "text"}, ...]}, ...]}."""

    object: Literal["fine_tuning.job.transcripts"] = "fine_tuning.job.transcripts"
    base: dict[str, Any] | None = None
    newest: dict[str, Any] | None = None


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
    """The permissions of a checkpoint: always none, because every key may use every checkpoint."""

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
    """A page of a list, with the ids that the SDK uses to ask for the next page."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "has_more": has_more, "first_id": first, "last_id": last}


def event(message: str, level: str = "info", data: dict[str, Any] | None = None) -> dict[str, Any]:
    """A new event. It is of type "metrics" if it has numbers, else of type "message"."""
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
