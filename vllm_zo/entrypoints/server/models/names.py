"""Names of fine-tuned models.

ft:<base>:vllm-zo:<suffix>:<id>                   the model that a job gave back
ft:<base>:vllm-zo:<suffix>:<id>:ckpt-step-<n>     each of its checkpoints
job:<job id>                                      the newest checkpoint of a job, at the time of the request
live:<job id>                                     the live version of a continual job (server/live/)
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_zo.checkpoint.adapter_files import WEIGHTS, check_adapter, file_digest
from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.http.schemas import now
from vllm_zo.entrypoints.server.keys.current import OPERATOR, current_project
from vllm_zo.entrypoints.server.models.vllm_models import Serving
from vllm_zo.entrypoints.server.state.directory import StateDir
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.entrypoints.server.state.store import Store
from vllm_zo.errors import ConfigError

logger = logging.getLogger("vllm.zo.server")

ORGANIZATION = "vllm-zo"
LOADED, UNLOADED = "loaded", "unloaded"


def final_name(job: JobRecord) -> str:
    base = Path(job.model).name  # vLLM names a model by its path: the directory's last part is enough for people
    return ":".join(["ft", base, ORGANIZATION, job.suffix or "", job.id.removeprefix("ftjob-")])


def checkpoint_name(job: JobRecord, step: int) -> str:
    return f"{final_name(job)}:ckpt-step-{step}"


def alias(job_id: str) -> str:
    return f"job:{job_id}"


def live_alias(job_id: str) -> str:
    return f"live:{job_id}"


class ModelNames:
    """Fine-tuned models on disk, in the store and at vLLM. Its coroutines belong to vLLM's event loop.

    Args:
        client: calls the engine's `zo_*` methods.
        base: fingerprint of the served base model (`base_fingerprint`). Its name would not do: the next server may
            serve another model under the same name from the same state directory.
    """

    def __init__(self, state: StateDir, store: Store, serving: Serving, client: Any, base: str) -> None:
        self._state, self._store, self._serving, self._client = state, store, serving, client
        self.base = base
        self.in_base: str | None = None
        """Name of the `fold` job's model that the base holds (`keep_base`), or None."""
        # asyncio itself keeps only a weak reference to a task: without this one it could vanish half-way.
        self._background: set[asyncio.Task[None]] = set()

    def restore(self) -> None:
        """Serve again what an earlier server served, as far as it fits. Call it once, before requests come."""
        for model in self._store.all("models", statuses=[LOADED]):
            if (why := self._why_not(model)) is not None:
                logger.warning("model %s is not served: %s", model["id"], why)
                continue
            self._serving.restore(model["id"], self.directory(model), model.get("owner", OPERATOR))
            # The store gives them in the order in which they were made, so the alias ends at the newest.
            if model["kind"] == "checkpoint":
                self._serving.point(alias(model["job_id"]), model["id"])

    def _why_not(self, model: Mapping[str, Any]) -> str | None:
        """The reason why a model's adapter cannot be served any more, or None."""
        if model["base"] != self.base:
            return f"it was made from another base model (fingerprint {model['base']}; this one has {self.base})"
        directory = self.directory(model)
        # Now and not when a client asks for it: vLLM would answer with an error of its loader, or serve other weights.
        try:
            check_adapter(directory)
            digest = file_digest(directory / WEIGHTS)
        except (ConfigError, OSError) as error:
            return str(error)
        return None if digest == model["digest"] else f"{directory / WEIGHTS} is not what was written there"

    def sweep(self) -> None:
        """Remove adapter directories that no record names: a killed server was writing or deleting them."""
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

    async def announce(self, job: JobRecord, name: str, step: int, kind: str) -> None:
        """Serve the adapter of a checkpoint as `name`, also after a restart.

        Args:
            kind: "checkpoint" or "final"; "merged" for the whole model of a `fold` job, which is recorded only.

        Raises:
            ConfigError: the engine cannot load it. Nothing is recorded then.
        """
        model = {"id": name, "object": "model", "created": now(), "owned_by": ORGANIZATION, "job_id": job.id}
        model |= {"step": step, "kind": kind, "status": UNLOADED if kind == "merged" else LOADED}
        model |= {"base": self.base, "digest": None, "owner": job.owner}
        if kind != "merged":
            model["digest"] = await asyncio.to_thread(file_digest, self.directory(model) / WEIGHTS)
            # Before the record: what the engine refuses must not be in the list of served models after a restart.
            await self._serving.add(name, self.directory(model), job.owner)
        await asyncio.to_thread(self._remember, model)
        # Last: the alias points at a name that vLLM must know by now.
        if kind == "checkpoint":
            self._serving.point(alias(job.id), name)

    def _remember(self, model: dict[str, Any]) -> None:
        # It may be there already: a server that was killed half-way announces it again.
        with self._store.transaction():
            self._store.delete("models", model["id"])
            self._store.add("models", model, parent=model["job_id"])

    def find(self, name: str) -> dict[str, Any]:
        """The record of the fine-tuned model `name`. For an alias it is that of the job's newest checkpoint.

        Raises:
            APIError: 404, there is none.
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
        """Stop serving a model. With `delete` its files are removed too, as soon as no request uses them.

        If the base holds the model of a `fold` job (`keep_base`), it gets back the weights that it was loaded with.

        Raises:
            APIError: 404, there is no such model; 409, the name is an alias, which names no model of its own, or the
                base is in use.
        """
        model = await asyncio.to_thread(self.find, name)
        if model["id"] != name:
            raise APIError(409, f"{name!r} is the newest checkpoint, {model['id']!r}: unload that.", "model")
        if self._serving.means(live_alias(model["job_id"]), name):
            raise APIError(409, f"{name!r} is live: promote another version, or roll back, first.", "model")
        job_alias = alias(model["job_id"])
        if name in self._serving.base_names:
            await self._restore_base(name, model["job_id"])
        is_newest = self._serving.means(job_alias, name)
        # First the name, so that no new request comes; last the files, when those in flight have ended.
        request = self._serving.remove(name)
        if is_newest:
            await self._repoint(job_alias, name)
        if delete:
            await asyncio.to_thread(self._store.delete, "models", name)
        else:
            await asyncio.to_thread(self._store.update, "models", name, status=UNLOADED)
        # In a task: a request in flight may take minutes, and the client shall not wait for it.
        task = asyncio.create_task(self._clean_up(model, request, delete))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _restore_base(self, name: str, job_id: str) -> None:
        try:
            await self._client.call("zo_restore_base", job_id)
        except ConfigError as error:
            raise APIError(409, str(error), "model") from error
        self._serving.remove_base_name(name)
        self.in_base = None

    async def _repoint(self, job_alias: str, gone: str) -> None:
        """Let the alias of a job mean the newest checkpoint that is left after `gone`; remove it if there is none."""
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
                await self._serving.unused(self.directory(model))
                await asyncio.to_thread(self._remove_files, model)
        except (OSError, ConfigError) as error:
            logger.error("model %s: cannot be removed: %s", model["id"], error)

    def _remove_files(self, model: dict[str, Any]) -> None:
        """Remove a model's directory, unless another model uses it: a final model may be one of the checkpoints."""
        directory = self.directory(model)
        others = self._store.all("models", parent=model["job_id"])
        if not any(self.directory(other) == directory for other in others):
            shutil.rmtree(directory, ignore_errors=True)

    def listed(self) -> list[dict[str, Any]]:
        """Every model that is served now, as `/v1/models` shows it: first the base, then the adapters."""
        base = self._serving.base_names
        if current_project() is not None:  # that the operator's job is in the base is nobody else's business
            base = [name for name in base if name != self.in_base]
        cards: list[dict[str, Any]] = [
            {"id": name, "created": now(), "owned_by": "vllm", "max_model_len": self._serving.max_model_len}
            for name in base
        ]
        known = {model["id"]: model for model in self._store.all("models", statuses=[LOADED])}
        for name in self._serving.names():
            created = known.get(name, {}).get("created", now())
            owner = ORGANIZATION if name in known or name.startswith(("job:", "live:")) else "vllm"
            cards.append({"id": name, "created": created, "owned_by": owner, "parent": base[0]})
        return cards

    def name_base(self, name: str) -> None:
        """Let the base answer to `name`, the model of a `fold` job whose weights it keeps, until that is unloaded."""
        self._serving.add_base_name(name)
        self.in_base = name
