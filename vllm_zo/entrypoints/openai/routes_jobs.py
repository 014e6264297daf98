"""/v1/fine_tuning/jobs: create, list, retrieve, cancel, pause, resume, events, checkpoints."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse

from vllm_zo.entrypoints.openai.create_job import create
from vllm_zo.entrypoints.openai.errors import APIError, OpenAIRoute
from vllm_zo.entrypoints.openai.events import event_stream
from vllm_zo.entrypoints.openai.job_request import JobRequest
from vllm_zo.entrypoints.openai.service import ERRORS, Service, service
from vllm_zo.entrypoints.openai.wire import CheckpointList, EventList, Job, JobList, listing

router = APIRouter(prefix="/v1/fine_tuning/jobs", route_class=OpenAIRoute, tags=["fine-tuning"], responses=ERRORS)

Limit = Annotated[int, Query(ge=1, le=1000)]
METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)


@router.post("", response_model=Job)
async def create_job(request: Request, body: JobRequest) -> Any:
    """Start a fine-tuning job."""
    return await create(service(request), body)


@router.get("", response_model=JobList)
def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> Any:
    """Jobs, newest first; `metadata[key]=value` filters."""
    filters = {m[1]: value for name, value in request.query_params.items() if (m := METADATA.fullmatch(name))}
    page = service(request).store.page("jobs", after=after, limit=limit, metadata=filters)
    return listing(page.data, page.has_more)


def _find(zo: Service, job_id: str) -> dict[str, Any]:
    if (job := zo.store.find("jobs", job_id)) is None:
        raise APIError(404, f"No such job: {job_id!r}.", "fine_tuning_job_id", "job_not_found")
    return job


@router.get("/{job_id}", response_model=Job)
def retrieve_job(request: Request, job_id: str) -> Any:
    """A job as it is now."""
    return _find(service(request), job_id)


@router.post("/{job_id}/cancel", response_model=Job)
async def cancel_job(request: Request, job_id: str) -> Any:
    """End a job; its last checkpoint stays usable."""
    zo = service(request)
    return await zo.runner.cancel(await asyncio.to_thread(_find, zo, job_id))


@router.post("/{job_id}/pause", response_model=Job)
async def pause_job(request: Request, job_id: str) -> Any:
    """Stop a job at the next group boundary; it frees its slots."""
    zo = service(request)
    return await zo.runner.pause(await asyncio.to_thread(_find, zo, job_id))


@router.post("/{job_id}/resume", response_model=Job)
async def resume_job(request: Request, job_id: str) -> Any:
    """Go on with a paused job, on the same trajectory."""
    zo = service(request)
    return await zo.runner.resume(await asyncio.to_thread(_find, zo, job_id))


@router.get("/{job_id}/events", response_model=EventList, responses={200: {"content": {"text/event-stream": {}}}})
async def list_events(
    request: Request,
    job_id: str,
    after: str | None = None,
    limit: Limit = 20,
    stream: bool = False,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Any:
    """Events, newest first; with `stream=true` live as server-sent events, oldest first, until the job ends."""
    zo = service(request)
    await asyncio.to_thread(_find, zo, job_id)
    if not stream:
        page = await asyncio.to_thread(zo.store.page, "events", after=after, limit=limit, parent=job_id)
        return listing(page.data, page.has_more)
    after = after or last_event_id
    if after is not None and await asyncio.to_thread(zo.store.find, "events", after) is None:
        raise APIError(400, f"after={after!r}: no such event.", "after")
    return StreamingResponse(event_stream(zo.store, zo.hub, job_id, after), media_type="text/event-stream")


@router.get("/{job_id}/checkpoints", response_model=CheckpointList)
def list_checkpoints(request: Request, job_id: str, after: str | None = None, limit: Limit = 10) -> Any:
    """Checkpoints of a job, newest first."""
    zo = service(request)
    _find(zo, job_id)
    page = zo.store.page("checkpoints", after=after, limit=limit, parent=job_id)
    return listing(page.data, page.has_more)
