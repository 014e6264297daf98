"""/v1/fine_tuning/jobs: create, list, retrieve, cancel, pause, resume, events, checkpoints."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse

from vllm_zo.entrypoints.server.context import ERRORS, service
from vllm_zo.entrypoints.server.http.errors import APIError, OpenAIRoute
from vllm_zo.entrypoints.server.http.events import event_stream
from vllm_zo.entrypoints.server.http.schemas import CheckpointList, EventList, Job, JobList, Transcripts, listing
from vllm_zo.entrypoints.server.jobs.create import create
from vllm_zo.entrypoints.server.jobs.request import JobRequest
from vllm_zo.jobs.directory import JobDir

router = APIRouter(prefix="/v1/fine_tuning/jobs", route_class=OpenAIRoute, tags=["fine-tuning"], responses=ERRORS)

Limit = Annotated[int, Query(ge=1, le=1000)]
STREAM_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would otherwise hold events back until it has some KB of them
}
METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)


@router.post("", response_model=Job)
async def create_job(request: Request, body: JobRequest) -> Any:
    """Start a fine-tuning job."""
    job = await create(service(request), body)
    request.state.made = job.id  # for the audit line
    return job.to_json()


@router.get("", response_model=JobList)
def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> Any:
    """Jobs, newest first; `metadata[key]=value` filters."""
    filters = {m[1]: value for name, value in request.query_params.items() if (m := METADATA.fullmatch(name))}
    page = service(request).store.page("jobs", after=after, limit=limit, metadata=filters)
    return listing(page.data, page.has_more)


@router.get("/{job_id}", response_model=Job)
def retrieve_job(request: Request, job_id: str) -> Any:
    """A job as it is now."""
    return service(request).store.job(job_id).to_json()


@router.post("/{job_id}/cancel", response_model=Job)
async def cancel_job(request: Request, job_id: str) -> Any:
    """End a job; its last checkpoint stays usable."""
    return (await service(request).runner.cancel(job_id)).to_json()


@router.post("/{job_id}/pause", response_model=Job)
async def pause_job(request: Request, job_id: str) -> Any:
    """Stop a job at the next group boundary. It keeps its state and frees its slots."""
    return (await service(request).runner.pause(job_id)).to_json()


@router.post("/{job_id}/resume", response_model=Job)
async def resume_job(request: Request, job_id: str) -> Any:
    """Go on with a paused job, on the same trajectory."""
    return (await service(request).runner.resume(job_id)).to_json()


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
    # For its 404. This route is a coroutine, unlike the other lists: the stream waits on the hub, on the event loop.
    await asyncio.to_thread(zo.store.job, job_id)
    if not stream:
        note = zo.hub.unwritten.get(job_id)
        if note is not None and after == note["id"]:
            note, after = None, None
        if note is not None and after is None:
            # The newest event, and not in the store yet: the store's disk is full.
            page = await asyncio.to_thread(zo.store.page, "events", limit=limit, parent=job_id)
            return listing([note, *page.data][:limit], page.has_more or len(page.data) == limit)
        page = await asyncio.to_thread(zo.store.page, "events", after=after, limit=limit, parent=job_id)
        return listing(page.data, page.has_more)
    # A browser's EventSource sends this header when it connects again.
    after = after or last_event_id
    # Checked here: once a stream has begun, its status is 200 and an error could only cut it off.
    if after is not None and await asyncio.to_thread(zo.store.find, "events", after) is None:
        raise APIError(400, f"after={after!r}: no such event.", "after")
    events = event_stream(zo.store, zo.hub, job_id, after)
    return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)


@router.get("/{job_id}/checkpoints", response_model=CheckpointList)
def list_checkpoints(request: Request, job_id: str, after: str | None = None, limit: Limit = 10) -> Any:
    """Checkpoints of a job, newest first."""
    zo = service(request)
    zo.store.job(job_id)
    page = zo.store.page("checkpoints", after=after, limit=limit, parent=job_id)
    return listing(page.data, page.has_more)


@router.get("/{job_id}/transcripts", response_model=Transcripts)
def list_transcripts(request: Request, job_id: str) -> Any:
    """Of a job with rollouts: what the first validation rows said in its first evaluation and in its newest one."""
    zo = service(request)
    zo.store.job(job_id)
    return JobDir(zo.state.job(job_id)).read_transcripts()
