"""/v1/files: upload, list, retrieve, delete, content."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse

from vllm_zo.entrypoints.openai.errors import APIError, OpenAIRoute
from vllm_zo.entrypoints.openai.service import ERRORS, service
from vllm_zo.entrypoints.openai.wire import UNFINISHED, Deleted, FileList, FileObject, listing

router = APIRouter(prefix="/v1/files", route_class=OpenAIRoute, tags=["files"], responses=ERRORS)

MULTIPART_BYTES = 1 << 16
"""What an upload may be longer than the file in it."""


@router.post("", response_model=FileObject)
async def create_file(request: Request, file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()]) -> Any:
    """Upload a JSONL file of training or validation data."""
    files = service(request).files
    if file.size is not None and file.size > service(request).settings.upload_limit_bytes:
        raise APIError(413, "The file is larger than this server takes (--zo-upload-limit-mb).", "file", "too_large")
    return await asyncio.to_thread(files.keep, file.file, file.filename or "", purpose)


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
    for job in zo.store.all("jobs", statuses=UNFINISHED):
        if file_id in (job["training_file"], job["validation_file"]) and job["total_steps"] == 0:
            raise APIError(409, f"{file_id!r} is being read for job {job['id']}; cancel that first.", "file_id")
    zo.files.delete(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@router.get("/{file_id}/content", response_class=FileResponse)
def file_content(request: Request, file_id: str) -> Any:
    """A file's bytes."""
    files = service(request).files
    record, path = files.find(file_id), files.path(file_id)
    if not path.is_file():
        raise APIError(404, f"The contents of {file_id!r} are gone.", "file_id", "file_not_found")
    return FileResponse(path, media_type="application/octet-stream", filename=record["filename"])
