"""Makes a job of a create request that can work. Refuses any other with the reason, before a job exists."""

from __future__ import annotations

import asyncio

from vllm_zo.entrypoints.server.context import Service
from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.http.schemas import event, new_id, now
from vllm_zo.entrypoints.server.jobs.request import (
    JobRequest,
    read_request,
    shown_hyperparameters,
    shown_method,
)
from vllm_zo.entrypoints.server.jobs.wandb_run import check_available
from vllm_zo.entrypoints.server.keys.current import OPERATOR, current_project
from vllm_zo.entrypoints.server.models.names import ORGANIZATION
from vllm_zo.entrypoints.server.state.files import TRAINING
from vllm_zo.entrypoints.server.state.job_record import JobRecord


async def create(zo: Service, request: JobRequest) -> JobRecord:
    """Check a request, write the job down, and start its task.

    Raises:
        APIError, ConfigError: a field cannot be used; the message names it and what the server accepts. No job exists
            then.
    """
    job = await asyncio.to_thread(_describe, zo, request)
    # Written before its task starts: a server that is killed right after its answer finds the job at its next start.
    await asyncio.to_thread(_write, zo, job)
    zo.feedback.watch(job)
    zo.runner.submit(job)
    return job


def _write(zo: Service, job: JobRecord) -> None:
    """Raises APIError: 429, the job's project may have no further job."""
    with zo.store.transaction():  # two requests at once must not both be the last one that is allowed
        zo.quotas.take_job()
        zo.store.add_job(job, event(f"Created fine-tuning job: {job.id}"))


def _describe(zo: Service, request: JobRequest) -> JobRecord:
    """The record of the job that a request asks for. Its fields are those that are known without the data.

    Raises:
        APIError, ConfigError: as in `create`.
    """
    _check_model(zo, request.model)
    wanted = read_request(request)
    for name in ("training_file", "validation_file"):
        if (file_id := getattr(request, name)) is not None and zo.files.find(file_id, name)["purpose"] != TRAINING:
            raise APIError(400, f"{name}={file_id!r}: it was not uploaded with purpose {TRAINING!r}.", name)
    if request.integrations:
        check_available()
    config = zo.runner.preparer.check(wanted)
    if config.space == "fold" and current_project() is not None:
        raise APIError(
            403,
            "update_space='fold' takes the engine from all projects: only the operator's key may create such a job.",
            "method",
        )
    shown = shown_hyperparameters(wanted, config, None)
    return JobRecord(
        id=new_id("ftjob-"),
        created_at=now(),
        model=request.model,
        organization_id=ORGANIZATION,
        hyperparameters=shown,
        method=shown_method(wanted, shown, wanted.objective),
        training_file=request.training_file,
        validation_file=request.validation_file,
        seed=wanted.seed,
        integrations=[one.model_dump() for one in request.integrations or []],
        metadata=request.metadata,
        suffix=wanted.suffix,
        owner=current_project() or OPERATOR,
        # With the seed that was drawn for a client who gave none: reading the request again must not draw another.
        request=request.model_dump() | {"seed": wanted.seed},
        model_path=zo.runner.preparer.model_path,
        base=zo.names.base,
        exclusive=config.space == "fold",
        keep_base=wanted.keep_base,
    )


def _check_model(zo: Service, model: str) -> None:
    base = zo.serving.base_names
    if model not in base:
        hint = "a job starts from the base model" if model in zo.serving.names() else "it is not served here"
        raise APIError(400, f"model={model!r}: {hint}; use {base[0]!r}.", "model", "model_not_found")
    if (kept := zo.names.in_base) is not None:
        which = repr(kept) if current_project() is None else "A model of the operator"
        raise APIError(
            409, f"{which} is in the base now, and a job starts from the model as it was loaded: unload that first."
        )
