"""One job in the engine, from its start to its end: events, checkpoints, names, result file."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
from typing import Any

from vllm_zo.entrypoints.openai.errors import when_there_is_room
from vllm_zo.entrypoints.openai.events import EventHub
from vllm_zo.entrypoints.openai.exports import export_adapter, export_whole, log_position, published_steps
from vllm_zo.entrypoints.openai.job_request import with_learning_rate
from vllm_zo.entrypoints.openai.metrics import kv_cache_usage
from vllm_zo.entrypoints.openai.models import ModelNames, checkpoint_name, final_name
from vllm_zo.entrypoints.openai.progress import Progress, best_step, result_csv
from vllm_zo.entrypoints.openai.state_dir import StateDir
from vllm_zo.entrypoints.openai.store import Store
from vllm_zo.entrypoints.openai.uploads import Files
from vllm_zo.entrypoints.openai.wire import (
    CANCELLED,
    FINAL,
    PAUSED,
    PAUSING,
    RUNNING,
    SUCCEEDED,
    event,
    new_id,
    now,
)
from vllm_zo.errors import ZOError
from vllm_zo.methods.step_size import AUTO

logger = logging.getLogger("vllm.zo.server")

POLL_INTERVAL_S = 0.2
LAST_VERSION_LOOKS = 50


class Follower:
    """Asks the engine about one job until it has ended or is paused, and writes down what it hears.

    Everything here may happen twice: a server that was killed in the middle does it again after its restart.

    Args:
        client: `call(method, *args)` of the engine.
        observer: is given every metrics record, in a thread (wandb).
    """

    def __init__(
        self,
        job: dict[str, Any],
        client: Any,
        state: StateDir,
        store: Store,
        files: Files,
        names: ModelNames,
        hub: EventHub,
        observer: Any = None,
    ) -> None:
        self.job = job
        self.id: str = job["id"]
        self.progress = Progress(job)
        self._directory = state.job(self.id)
        self._client, self._state, self._store = client, state, store
        self._files, self._names, self._hub = files, names, hub
        self._seen = 0
        self._refused: set[int] = set()
        """Steps whose checkpoint the engine does not take; told once."""
        self.observer = observer

    async def follow(self) -> str:
        """Until the job has ended (its record says how then), or is paused; returns the status.

        Raises:
            EngineDeadError: the engine has gone.
        """
        while True:
            answer = await self._client.call("zo_status", self.id, self._seen)
            self._seen = answer["next"]
            await self._record(answer["status"], answer["records"], answer["learning_rate"])
            self._hub.notify(self.id)
            await self._observe(answer["records"])
            await self._publish()
            if answer["status"] in FINAL:
                await self._last_versions(answer["published"])
                await self._finish(answer["status"], answer["error"])
                return str(answer["status"])
            if answer["status"] == PAUSED:
                await self._say(f"The job is paused at step {self.progress.step}", status=PAUSED, estimated_finish=None)
                return PAUSED
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _record(self, status: str, records: list[dict[str, Any]], learning_rate: float | None) -> None:
        before = copy.deepcopy(self.progress)

        def write() -> None:
            self.progress = copy.deepcopy(before)  # a write that failed has told nobody of anything
            self._write(status, records, learning_rate)

        await when_there_is_room(write)

    def _write(self, status: str, records: list[dict[str, Any]], learning_rate: float | None = None) -> None:
        if not records and self.job["status"] in (status, PAUSING):
            return
        events = self.progress.take(records, kv_cache_usage())
        changes = self.progress.fields()
        with self._store.transaction():
            current = self._store.find("jobs", self.id) or self.job
            if status == RUNNING and current["status"] != PAUSING:
                changes["status"] = RUNNING
            if learning_rate is not None and current["hyperparameters"]["learning_rate"] == AUTO:
                changes |= with_learning_rate(current, learning_rate)
            self._store.add_all("events", events, parent=self.id)
            self.job = self._store.update("jobs", self.id, **changes)

    def catch_up(self) -> dict[str, Any]:
        """Tell what the engine of a killed server has logged and nobody has asked for; returns the job's record.

        The engine goes on behind its seed log, and never says those steps again. What `metrics.jsonl` holds beyond the
        log is taken again, and told then.
        """
        steps, path = log_position(self._directory), self._directory / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith(b"\n")]
        self._write(self.job["status"], [record for record in records if record["step"] <= steps])
        return self.job

    async def _observe(self, records: list[dict[str, Any]]) -> None:
        if self.observer is None or not records:
            return
        try:
            await asyncio.to_thread(lambda: [self.observer(record) for record in records])
        except Exception as error:  # somebody else's service: its troubles are not the job's
            self.observer = None
            await self._say(f"wandb gets no more metrics: {type(error).__name__}: {error}", level="warn")

    async def _say(self, *messages: str, level: str = "info", **changes: Any) -> None:
        """Messages and changes of the job's record, together or not at all."""

        def write() -> None:
            with self._store.transaction():
                self._store.add_all("events", [event(message, level) for message in messages], parent=self.id)
                self.job = self._store.update("jobs", self.id, **changes)

        await when_there_is_room(write)
        self._hub.notify(self.id)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    async def _publish(self, *, ended: bool = False) -> None:
        """Make checkpoints of the states that the engine has written since the last look.

        A state is written before its evaluation is in, which a checkpoint should have with it.
        """
        if self.job["exclusive"]:
            return
        done = {c["step_number"] for c in await asyncio.to_thread(self._store.all, "checkpoints", parent=self.id)}
        for step in await asyncio.to_thread(published_steps, self._directory):
            if step == 0 or step in done | self._refused or (self._evaluation_pending(step) and not ended):
                continue
            if await asyncio.to_thread(export_adapter, self._state, self.job, step):
                await self._announce(step)

    def _evaluation_pending(self, step: int) -> bool:
        interval = self.job["hyperparameters"]["eval_interval"]
        due = self.job["validation_file"] is not None and (step % interval == 0 or step == self.progress.total)
        return due and all(known["step"] != step for known in self.progress.evaluations)

    async def _last_versions(self, published: list[int]) -> None:
        """The engine writes its last state after it has said that the job ended."""
        for _ in range(LAST_VERSION_LOOKS):
            if set(published) <= set(published_steps(self._directory)):
                break
            await asyncio.sleep(POLL_INTERVAL_S)
        await self._publish(ended=True)

    async def _announce(self, step: int) -> None:
        name = checkpoint_name(self.job, step)
        try:
            await self._names.announce(name, self.id, step, "checkpoint")
        except ZOError as error:
            self._refused.add(step)
            await self._say(f"Checkpoint of step {step} is not served: {error}", level="warn")
            return
        record = {
            "id": new_id("ftckpt-"),
            "object": "fine_tuning.job.checkpoint",
            "created_at": now(),
            "fine_tuning_job_id": self.id,
            "fine_tuned_model_checkpoint": name,
            "step_number": step,
            "metrics": self.progress.checkpoint_metrics(step),
        }
        await asyncio.to_thread(self._store.add, "checkpoints", record, self.id)
        await self._say(f"Checkpoint created at step {step}: {name}")

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _finish(self, status: str, error: str | None) -> None:
        if status != SUCCEEDED:
            if self.job["exclusive"]:
                await self._client.call("zo_restore_base", self.id)
            await self.end(status, error or "")
            return
        changes: dict[str, Any] = {"finished_at": now(), "estimated_finish": None}
        messages = []
        name = await self._result()
        if name is not None:
            changes["fine_tuned_model"] = name
            messages.append(f"New fine-tuned model created: {name}")
        if not self.job["result_files"]:
            changes["result_files"] = [await asyncio.to_thread(self._result_file)]
        await self._say(*messages, "The job has successfully completed", status=SUCCEEDED, **changes)

    async def end(self, status: str, why: str, code: str = "training_failed") -> None:
        """Close a job that did not succeed. What it has learnt until its last checkpoint stays usable."""
        changes: dict[str, Any] = {"status": status, "finished_at": now(), "estimated_finish": None}
        kept = await asyncio.to_thread(self._store.all, "checkpoints", parent=self.id)
        last = kept[-1]["fine_tuned_model_checkpoint"] if kept else None
        kept_as = f" Its last checkpoint is {last}." if last else " It has no checkpoint yet."
        if status == CANCELLED:
            await self._say(f"The job was cancelled at step {self.progress.step}.{kept_as}", **changes)
            return
        message = f"{why.rstrip('.')}.{kept_as}"
        changes["error"] = {"code": code, "message": message, "param": None}
        await self._say(f"The job failed at step {self.progress.step}: {message}", level="error", **changes)

    async def _result(self) -> str | None:
        """Give the model that the job leaves its final name."""
        if self.job["exclusive"]:
            return await self._merged_result()
        step = self.progress.step
        if self.job["keep_best"] and (best := best_step(self.progress.evaluations)) is not None:
            step = best
        await asyncio.to_thread(export_adapter, self._state, self.job, step)  # the log is closed: it has every step
        name = final_name(self.job)
        try:
            await self._names.announce(name, self.id, step, "final")
        except ZOError as error:
            await self._say(f"The fine-tuned model is not served: {error}", level="warn")
            return None
        return name

    async def _merged_result(self) -> str:
        name = final_name(self.job)
        await asyncio.to_thread(export_whole, self._state, self.job)
        await self._names.announce(name, self.id, self.progress.step, "merged")
        if self.job["wanted"]["keep_base"]:
            self._names.name_base(name)
        else:
            await self._client.call("zo_restore_base", self.id)
        return name

    def _result_file(self) -> str:
        content = result_csv(self._directory)
        return str(self._files.keep_result(content, f"{self.id}-results.csv")["id"])
