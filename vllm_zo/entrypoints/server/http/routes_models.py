"""/v1/models with the fine-tuned models; unloading a model; downloading its adapter."""

from __future__ import annotations

import asyncio
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.convertors import PathConvertor, register_url_convertor

from vllm_zo.entrypoints.server.context import ERRORS, service
from vllm_zo.entrypoints.server.http.errors import APIError, OpenAIRoute
from vllm_zo.entrypoints.server.http.schemas import Deleted, ErrorEnvelope, Model, ModelList, Permissions

router = APIRouter(route_class=OpenAIRoute, tags=["models"], responses=ERRORS)

CHECKPOINTS = "/v1/fine_tuning/checkpoints/{name}"
CHUNK = 1 << 18


class NameConvertor(PathConvertor):
    """The rest of a path: a base model's name may have slashes. What is no name may have line feeds, at which
    Starlette's own `path` ends: the router's 404 would be none of OpenAI's."""

    regex = r"[\s\S]*"


register_url_convertor("model_name", NameConvertor())


@router.get("/v1/models", response_model=ModelList)
async def list_models(request: Request) -> Any:
    """Every model that a request may name in `model=`."""
    return {"object": "list", "data": await asyncio.to_thread(service(request).names.listed)}


@router.get("/v1/models/{name:model_name}", response_model=Model)
async def retrieve_model(request: Request, name: str) -> Any:
    """One of these models."""
    for card in await asyncio.to_thread(service(request).names.listed):
        if card["id"] == name:
            return card
    raise APIError(404, f"The model {name!r} does not exist.", "model", "model_not_found")


@router.delete("/v1/models/{name:model_name}", response_model=Deleted)
async def delete_model(request: Request, name: str, delete_files: bool = False) -> Any:
    """Stop serving a fine-tuned model; with `delete_files=true` remove its adapter as well."""
    await service(request).names.unload(name, delete=delete_files)
    return {"id": name, "object": "model", "deleted": True}


@router.get(CHECKPOINTS + "/content", response_class=StreamingResponse)
def checkpoint_content(request: Request, name: str) -> Any:
    """The PEFT directory of a checkpoint or fine-tuned model (after `fold`: the whole model) as a .tar."""
    zo = service(request)
    directory = zo.names.directory(zo.names.find(name))
    if not directory.is_dir():
        raise APIError(404, f"The files of {name!r} are gone.", "name")
    archive, size = _archive(directory, zo.state.root)
    # An HTTP header takes Latin-1 only, and quotes end the name; a fine-tuned model's name has neither.
    disposition = f'attachment; filename="{name.replace(":", "-")}.tar"'
    return StreamingResponse(
        iter(lambda: archive.read(CHUNK), b""),
        media_type="application/x-tar",
        headers={"Content-Length": str(size), "Content-Disposition": disposition},
    )


def _archive(directory: Path, scratch: Path) -> tuple[IO[bytes], int]:
    """The directory as a .tar, in a file without a name: nothing is left of it, however the download or the server
    ends. Returns the file, at its start, and its size in bytes. It is not compressed: weights hardly shrink.

    Raises:
        OSError: the disk refuses.
    """
    # In the state directory, not in /tmp: /tmp is often small and in memory, and a `fold` job's model is large.
    file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - the response reads it and closes it
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(directory, arcname=directory.name)
    size = file.tell()
    file.seek(0)
    return file, size


@router.get(CHECKPOINTS + "/permissions", response_model=Permissions)
def list_permissions(request: Request, name: str) -> Any:
    """Always an empty list: every key may use every checkpoint."""
    service(request).names.find(name)  # for its 404
    return Permissions()


@router.post(CHECKPOINTS + "/permissions", responses={403: {"model": ErrorEnvelope}})
def create_permission(request: Request, name: str) -> Permissions:
    """Always 403, as OpenAI answers a key without admin rights: this server has no projects to share with."""
    service(request).names.find(name)
    raise APIError(
        403,
        "You have insufficient permissions for this operation: checkpoints are not shared with projects here. Every "
        "key of this server may use every checkpoint.",
        code="insufficient_permissions",
    )


@router.delete(CHECKPOINTS + "/permissions/{permission_id}", response_model=Deleted)
def delete_permission(request: Request, name: str, permission_id: str) -> Any:
    """Always 404: there is no permission to take away."""
    service(request).names.find(name)
    raise APIError(404, f"The checkpoint {name!r} has no permission {permission_id!r}.", "permission_id")
