"""A create request that can work becomes a job; everything that is wrong with it is said before."""

from __future__ import annotations

import asyncio
from typing import Any

from vllm_zo.config import JobConfig
from vllm_zo.entrypoints.openai.errors import APIError
from vllm_zo.entrypoints.openai.job_request import (
    JobRequest,
    Wanted,
    read_request,
    shown_hyperparameters,
    shown_method,
)
from vllm_zo.entrypoints.openai.models import ORGANIZATION
from vllm_zo.entrypoints.openai.prepare import PROVISIONAL_ROWS
from vllm_zo.entrypoints.openai.service import Service
from vllm_zo.entrypoints.openai.uploads import TRAINING
from vllm_zo.entrypoints.openai.wandb_run import check_available
from vllm_zo.entrypoints.openai.wire import VALIDATING, event, new_id, now


async def create(zo: Service, request: JobRequest) -> dict[str, Any]:
    """Check a request, write the job down, and set it going.

    Raises:
        APIError, ConfigError: names the field and what is accepted; no job exists then.
    """
    job = await asyncio.to_thread(_describe, zo, request)
    if job["exclusive"]:
        _check_alone(zo)
    await asyncio.to_thread(_write, zo, job)
    zo.runner.submit(job)
    return job


def _describe(zo: Service, request: JobRequest) -> dict[str, Any]:
    _check_model(zo, request.model)
    wanted = read_request(request)
    for name in ("training_file", "validation_file"):
        if (file_id := getattr(request, name)) is not None and zo.files.find(file_id, name)["purpose"] != TRAINING:
            raise APIError(400, f"{name}={file_id!r}: it was not uploaded with purpose {TRAINING!r}.", name)
    if request.integrations:
        check_available()
    config = zo.runner.check(wanted)
    return _record(zo, request, wanted, config)


def _check_model(zo: Service, model: str) -> None:
    base = zo.serving.base_names
    if model not in base:
        hint = "a job starts from the base model" if model in zo.serving.names() else "it is not served here"
        raise APIError(400, f"model={model!r}: {hint}; use {base[0]!r}.", "model", "model_not_found")


def _check_alone(zo: Service) -> None:
    """A `fold` job changes the base under everybody's feet: it is taken only while nobody else is there."""
    if zo.serving.busy or not zo.runner.idle:
        raise APIError(
            409,
            "update_space='fold' writes the base weights and needs the engine to itself: wait until other jobs and "
            "requests are done, or use update_space='bank'.",
            "update_space",
        )


def _record(zo: Service, request: JobRequest, wanted: Wanted, config: JobConfig) -> dict[str, Any]:
    """The job's record: what clients see, and what the server needs to go on with it after a restart."""
    shown = shown_hyperparameters(wanted, config, PROVISIONAL_ROWS)
    shown |= {name: wanted.given.get(name, "auto") for name in ("n_epochs", "batch_size")}
    public = {
        "id": new_id("ftjob-"),
        "object": "fine_tuning.job",
        "created_at": now(),
        "finished_at": None,
        "estimated_finish": None,
        "model": request.model,
        "fine_tuned_model": None,
        "organization_id": ORGANIZATION,
        "status": VALIDATING,
        "error": None,
        "hyperparameters": shown,
        "method": shown_method(wanted, shown, wanted.objective),
        "training_file": request.training_file,
        "validation_file": request.validation_file,
        "result_files": [],
        "trained_tokens": None,
        "seed": wanted.seed,
        "integrations": [one.model_dump() for one in request.integrations or []],
        "metadata": request.metadata,
        "suffix": wanted.suffix,
        "step": 0,
        "total_steps": 0,
    }
    internal = {
        "wanted": wanted.to_json(),
        "model_path": zo.runner.model_path,
        "exclusive": config.space == "fold",
        "keep_best": False,
    }
    return public | internal


def _write(zo: Service, job: dict[str, Any]) -> None:
    with zo.store.transaction():
        zo.store.add("jobs", job)
        zo.store.add("events", event(f"Created fine-tuning job: {job['id']}"), parent=job["id"])
