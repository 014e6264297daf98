"""/v1/models with the fine-tuned ones, unloading them, and downloading their adapters."""

from __future__ import annotations

import asyncio
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from vllm_zo.entrypoints.openai.errors import APIError, OpenAIRoute
from vllm_zo.entrypoints.openai.service import ERRORS, service
from vllm_zo.entrypoints.openai.wire import Deleted, Model, ModelList, Permissions

router = APIRouter(route_class=OpenAIRoute, tags=["models"], responses=ERRORS)

CHECKPOINTS = "/v1/fine_tuning/checkpoints/{name}"


@router.get("/v1/models", response_model=ModelList)
async def list_models(request: Request) -> Any:
    """Everything that may stand for `model=`."""
    return {"object": "list", "data": await asyncio.to_thread(service(request).names.listed)}


@router.get("/v1/models/{name:path}", response_model=Model)
async def retrieve_model(request: Request, name: str) -> Any:
    """One of them."""
    for card in await asyncio.to_thread(service(request).names.listed):
        if card["id"] == name:
            return card
    raise APIError(404, f"The model {name!r} does not exist.", "model", "model_not_found")


@router.delete("/v1/models/{name:path}", response_model=Deleted)
async def delete_model(request: Request, name: str, delete_files: bool = False) -> Any:
    """Stop serving a fine-tuned model; with `delete_files=true` its adapter is removed as well."""
    await service(request).names.unload(name, delete=delete_files)
    return {"id": name, "object": "model", "deleted": True}


@router.get(CHECKPOINTS + "/content", response_class=FileResponse)
def checkpoint_content(request: Request, name: str) -> Any:
    """The PEFT directory of a checkpoint or fine-tuned model (after `fold`: the whole model) as a .tar."""
    zo = service(request)
    directory = zo.names.directory(zo.names.find(name))
    if not directory.is_dir():
        raise APIError(404, f"The files of {name!r} are gone.", "name")
    archive = _archive(directory, zo.state.root)
    return FileResponse(
        archive,
        media_type="application/x-tar",
        filename=f"{name.replace(':', '-')}.tar",
        background=BackgroundTask(os.unlink, archive),
    )


def _archive(directory: Path, scratch: Path) -> Path:
    """Not compressed: weights hardly shrink."""
    descriptor, path = tempfile.mkstemp(suffix=".tar", prefix=".download-", dir=scratch)
    try:
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(directory, arcname=directory.name)
    except OSError:
        os.unlink(path)
        raise
    return Path(path)


@router.get(CHECKPOINTS + "/permissions", response_model=Permissions)
def list_permissions(request: Request, name: str) -> Any:
    """Nobody: whoever has a key may use every checkpoint."""
    service(request).names.find(name)
    return Permissions()


@router.post(CHECKPOINTS + "/permissions", status_code=501)
def create_permission(request: Request, name: str) -> Any:
    """Not available: there are no organisations here to share with."""
    raise APIError(501, "Checkpoints are not shared with projects here: whoever has a key may use every one.")


@router.delete(CHECKPOINTS + "/permissions/{permission_id}", status_code=501)
def delete_permission(request: Request, name: str, permission_id: str) -> Any:
    """Not available, like creating one."""
    raise APIError(501, "Checkpoints are not shared with projects here: there is no permission to take away.")
