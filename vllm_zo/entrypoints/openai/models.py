"""Names of fine-tuned models.

ft:<base>:vllm-zo:<suffix>:<id>                   what a job gave back
ft:<base>:vllm-zo:<suffix>:<id>:ckpt-step-<n>     each of its checkpoints
job:<job id>                                      the newest checkpoint of a job, whichever that is
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_zo.entrypoints.openai.errors import APIError
from vllm_zo.entrypoints.openai.serving import Serving
from vllm_zo.entrypoints.openai.state_dir import StateDir
from vllm_zo.entrypoints.openai.store import Store
from vllm_zo.entrypoints.openai.wire import now
from vllm_zo.errors import ConfigError

logger = logging.getLogger("vllm.zo.server")

ORGANIZATION = "vllm-zo"
LOADED, UNLOADED = "loaded", "unloaded"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def final_name(job: Mapping[str, Any]) -> str:
    base = Path(job["model"]).name  # a model that is served from a directory is named by it
    return ":".join(["ft", base, ORGANIZATION, job.get("suffix") or "", job["id"].removeprefix("ftjob-")])


def checkpoint_name(job: Mapping[str, Any], step: int) -> str:
    return f"{final_name(job)}:ckpt-step-{step}"


def alias(job_id: str) -> str:
    return f"job:{job_id}"


class ModelNames:
    """Fine-tuned models on disk, in the store and at vLLM. Its coroutines belong to vLLM's event loop.

    Args:
        client: calls the engine's `zo_*` methods.
    """

    def __init__(self, state: StateDir, store: Store, serving: Serving, client: Any) -> None:
        self._state, self._store, self._serving, self._client = state, store, serving, client
        self._background: set[asyncio.Task[None]] = set()

    def restore(self) -> None:
        """After a start: serve again what was served. Once, before requests come."""
        for model in self._store.all("models", statuses=[LOADED]):
            directory = self.directory(model)
            if not all((directory / name).is_file() for name in ADAPTER_FILES):
                logger.error("model %s: its files in %s are gone; it is not served", model["id"], directory)
                continue
            self._serving.restore(model["id"], directory)
            if model["kind"] == "checkpoint":  # in the order they were made: the newest stays
                self._serving.point(alias(model["job_id"]), model["id"])

    def sweep(self) -> None:
        """Remove adapter directories that no record names: what a killed server was writing or deleting."""
        kept = {self.directory(model) for model in self._store.all("models")}
        for job in self._state.checkpoint("", 0).parent.iterdir():
            for directory in job.iterdir():
                if directory not in kept:
                    shutil.rmtree(directory)
            if not any(job.iterdir()):
                job.rmdir()

    def directory(self, model: Mapping[str, Any]) -> Path:
        if model["kind"] == "merged":
            return self._state.merged(model["job_id"])
        return self._state.checkpoint(model["job_id"], model["step"])

    async def announce(self, name: str, job_id: str, step: int, kind: str) -> None:
        """Serve the adapter of a checkpoint as `name`, for good.

        Args:
            kind: "checkpoint" or "final"; "merged" for the whole model of a `fold` job, which is not served.

        Raises:
            ConfigError: the engine cannot load it.
        """
        model = {"id": name, "object": "model", "created": now(), "owned_by": ORGANIZATION, "job_id": job_id}
        model |= {"step": step, "kind": kind, "status": UNLOADED if kind == "merged" else LOADED}
        if kind != "merged":
            await self._serving.add(name, self.directory(model))
        await asyncio.to_thread(self._remember, model)
        if kind == "checkpoint":
            self._serving.point(alias(job_id), name)

    def _remember(self, model: dict[str, Any]) -> None:
        with self._store.transaction():
            self._store.delete("models", model["id"])
            self._store.add("models", model, parent=model["job_id"])

    def find(self, name: str) -> dict[str, Any]:
        """The record of a fine-tuned model or of an alias's newest checkpoint.

        Raises:
            APIError: 404.
        """
        if name.startswith("job:"):
            models = self._store.all("models", parent=name.removeprefix("job:"))
            found = next((m for m in reversed(models) if m["kind"] == "checkpoint"), None)
        else:
            found = self._store.find("models", name)
        if found is None:
            raise APIError(404, f"The model {name!r} does not exist.", "model", "model_not_found")
        return found

    async def unload(self, name: str, *, delete: bool) -> None:
        """Stop serving a model; with `delete` its files go as well, as soon as nobody uses them.

        A `fold` job's model that is the base (`keep_base`): the base becomes what it was when it was loaded.

        Raises:
            APIError: 404; 409 for an alias, which names no model of its own, or while the base is in use.
        """
        model = await asyncio.to_thread(self.find, name)
        if model["id"] != name:
            raise APIError(409, f"{name!r} is the newest checkpoint, {model['id']!r}: unload that.", "model")
        job_alias = alias(model["job_id"])
        if name in self._serving.base_names:
            await self._restore_base(name, model["job_id"])
        request = self._serving.remove(name)
        if model["kind"] == "checkpoint":
            await self._repoint(job_alias, name)
        if delete:
            await asyncio.to_thread(self._store.delete, "models", name)
        else:
            await asyncio.to_thread(self._store.update, "models", name, status=UNLOADED)
        task = asyncio.create_task(self._clean_up(model, request, delete))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _restore_base(self, name: str, job_id: str) -> None:
        try:
            await self._client.call("zo_restore_base", job_id)
        except ConfigError as error:
            raise APIError(409, str(error), "model") from error
        self._serving.remove_base_name(name)

    async def _repoint(self, job_alias: str, gone: str) -> None:
        """The alias of a job whose checkpoint `gone` is unloaded: the newest of those that are left."""
        self._serving.remove(job_alias)
        models = await asyncio.to_thread(self._store.all, "models", parent=job_alias.removeprefix("job:"))
        left = [m["id"] for m in models if m["kind"] == "checkpoint" and m["status"] == LOADED and m["id"] != gone]
        if left:
            self._serving.point(job_alias, left[-1])

    async def _clean_up(self, model: dict[str, Any], request: Any, delete: bool) -> None:
        try:
            if request is not None:
                await self._serving.forget(request)
            if delete:
                await asyncio.to_thread(self._remove_files, model)
        except (OSError, ConfigError) as error:
            logger.error("model %s: cannot be removed: %s", model["id"], error)

    def _remove_files(self, model: dict[str, Any]) -> None:
        """A final model and a checkpoint may be the same directory: it goes with the last of them."""
        directory = self.directory(model)
        others = self._store.all("models", parent=model["job_id"])
        if not any(self.directory(other) == directory for other in others):
            shutil.rmtree(directory, ignore_errors=True)

    def listed(self) -> list[dict[str, Any]]:
        """Every model that is served now, as `/v1/models` shows it: base first, then adapters by name."""
        base = self._serving.base_names
        cards: list[dict[str, Any]] = [
            {"id": name, "created": now(), "owned_by": "vllm", "max_model_len": self._serving.max_model_len}
            for name in base
        ]
        known = {model["id"]: model for model in self._store.all("models", statuses=[LOADED])}
        for name in self._serving.names():
            created = known.get(name, {}).get("created", now())
            owner = ORGANIZATION if name in known or name.startswith("job:") else "vllm"
            cards.append({"id": name, "created": created, "owned_by": owner, "parent": base[0]})
        return cards

    def name_base(self, name: str) -> None:
        """The base answers to the name of a `fold` job whose weights it keeps, until that is unloaded."""
        self._serving.add_base_name(name)
