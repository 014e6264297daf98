"""/v1/files: upload, list, retrieve, delete, content."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse

from vllm_zo.entrypoints.server.context import ERRORS, service
from vllm_zo.entrypoints.server.http.errors import APIError, OpenAIRoute
from vllm_zo.entrypoints.server.http.schemas import Deleted, FileList, FileObject, listing
from vllm_zo.jobs.status import JobStatus

router = APIRouter(prefix="/v1/files", route_class=OpenAIRoute, tags=["files"], responses=ERRORS)

MULTIPART_BYTES = 1 << 16
"""Bytes by which an upload may be longer than the file in it: the other field, the names, the boundaries."""


@router.post("", response_model=FileObject)
async def create_file(request: Request, file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()]) -> Any:
    """Upload a JSONL file of training or validation data."""
    files = service(request).files
    if file.size is not None and file.size > service(request).settings.upload_limit_bytes:
        raise APIError(413, "The file is larger than this server takes (--zo-upload-limit-mb).", "file", "too_large")
    # FastAPI has read the body on the event loop, into memory or a temporary file. Checking it line by line blocks.
    record = await asyncio.to_thread(files.keep, file.file, file.filename or "", purpose)
    request.state.made = record["id"]  # for the audit line
    return record


create_file.body_limit = lambda request: service(request).settings.upload_limit_bytes + MULTIPART_BYTES  # type: ignore[attr-defined]


@router.get("", response_model=FileList)
def list_files(
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> Any:
    """Files, newest first."""
    page = service(request).store.page("files", after=after, limit=limit, parent=purpose, oldest_first=order == "asc")
    return listing(page.data, page.has_more)


@router.get("/{file_id}", response_model=FileObject)
def retrieve_file(request: Request, file_id: str) -> Any:
    """A file's description."""
    return service(request).files.find(file_id)


@router.delete("/{file_id}", response_model=Deleted)
def delete_file(request: Request, file_id: str) -> Any:
    """Remove a file; not while a job has still to read it."""
    zo = service(request)
    # Later statuses do not need it: the job's directory has its own, tokenised copy.
    for job in zo.store.jobs([JobStatus.VALIDATING]):
        if file_id in (job.training_file, job.validation_file):
            raise APIError(409, f"{file_id!r} is being read for job {job.id}; cancel that first.", "file_id")
    zo.files.delete(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@router.get("/{file_id}/content", response_class=FileResponse)
def file_content(request: Request, file_id: str) -> Any:
    """A file's bytes."""
    files = service(request).files
    record, path = files.find(file_id), files.path(file_id)
    if not path.is_file():
        raise APIError(404, f"The contents of {file_id!r} are gone.", "file_id", "file_not_found")
    # Not the upload's own type: a browser must not show a client's HTML as a page of this server.
    return FileResponse(path, media_type="application/octet-stream", filename=record["filename"])
