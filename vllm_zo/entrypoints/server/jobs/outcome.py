"""The results of a job: checkpoints while it runs, its model and its result file at the end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from vllm_zo.checkpoint.adapter_files import CONFIG
from vllm_zo.checkpoint.export import export_merged, export_peft, read_peft
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import logged_steps, read_header, read_seed_log
from vllm_zo.checkpoint.snapshot import load_snapshot, snapshot_step
from vllm_zo.entrypoints.server.http.schemas import event, new_id, now
from vllm_zo.entrypoints.server.jobs.progress import Progress, result_csv
from vllm_zo.entrypoints.server.live.versions import LiveVersions
from vllm_zo.entrypoints.server.models.names import ModelNames, checkpoint_name, final_name
from vllm_zo.entrypoints.server.state.directory import StateDir
from vllm_zo.entrypoints.server.state.files import Files
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.entrypoints.server.state.store import Store
from vllm_zo.errors import ConfigError, CorruptLogError, ZOError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.records import given_back
from vllm_zo.methods import drift
from vllm_zo.methods.state import AdapterState

LAST_FILE = CONFIG
"""The file that an export writes last: if it is there, the others are."""


@dataclass(frozen=True)
class Outcome:
    """Makes models of the states that the engine writes into a job's directory.

    Every method may run again for the same state: a server that was killed half-way does so after its restart.
    """

    client: Any
    state: StateDir
    store: Store
    files: Files
    names: ModelNames
    live: LiveVersions

    def job_dir(self, job: JobRecord) -> JobDir:
        return JobDir(self.state.job(job.id))

    # --- while the job runs -------------------------------------------------------------------------------------------

    async def publish(self, job: JobRecord, progress: Progress, refused: set[int], *, ended: bool) -> list[Any]:
        """Make checkpoints of the states that the engine has written since the last call; returns their events.

        The engine writes a state before the numbers of its evaluation arrive. Such a state waits for a later call, so
        that the checkpoint has them.

        Args:
            refused: steps whose checkpoint the engine has refused. The method adds those that it refuses now.
            ended: the job has ended, so no evaluation will come.
        """
        if job.exclusive:
            return []
        done = {c["step_number"] for c in await asyncio.to_thread(self.store.all, "checkpoints", parent=job.id)}
        events = []
        # What a continual job has pruned must not come back.
        newest = max(done, default=0) if job.continual else 0
        for step in await asyncio.to_thread(self.job_dir(job).published):
            if step < newest:
                continue
            if step == 0 or step in done | refused or (_evaluation_pending(job, progress, step) and not ended):
                continue
            if await asyncio.to_thread(self._export_adapter, job, step):
                events.append(await self._announce(job, progress, step, refused))
                if job.continual and step not in refused:
                    events += await self.live.consider(job, progress, step)
        if job.continual:
            await self.live.prune(job)
        return events

    async def _announce(self, job: JobRecord, progress: Progress, step: int, refused: set[int]) -> dict[str, Any]:
        name = checkpoint_name(job, step)
        try:
            await self.names.announce(job, name, step, "checkpoint")
        except ZOError as error:
            refused.add(step)
            return event(f"Checkpoint of step {step} is not served: {error}", "warn")
        record = {
            "id": new_id("ftckpt-"),
            "object": "fine_tuning.job.checkpoint",
            "created_at": now(),
            "fine_tuning_job_id": job.id,
            "fine_tuned_model_checkpoint": name,
            "step_number": step,
            "metrics": progress.checkpoint_metrics(step) | await asyncio.to_thread(self._distances, job, step),
        }
        await asyncio.to_thread(self.store.add, "checkpoints", record, job.id)
        return event(f"Checkpoint created at step {step}: {name}")

    def _export_adapter(self, job: JobRecord, step: int) -> bool:
        """Write the PEFT directory of a step, unless it is there. Returns False if there is nothing to write it from:
        the seed log has not that step yet (a thread of the engine writes it), or the version is gone."""
        target = self.state.checkpoint(job.id, step)
        if (target / LAST_FILE).exists():
            return True
        if logged_steps(self.job_dir(job).log) < step:
            return False
        state = self._state(job, step)
        if state is not None:
            export_peft(state, job.model_path, target)
        return state is not None

    def _state(self, job: JobRecord, step: int) -> AdapterState | None:
        """The state of a version: from its file, or from the seed log where the file does not hold it.

        None: the job is continual, and the engine, which keeps its newest versions only, has removed this one since it
        was listed. Newer ones are there, and a log without end takes too long to replay.
        """
        directory = self.job_dir(job)
        file = directory.version(step)
        try:
            if snapshot_step(file) == step:
                state = read_header(directory.log).new_state()
                load_snapshot(file, state)
                return state
        except ConfigError:
            if file.exists():
                raise
        if job.continual and not file.exists():
            return None
        return rebuild_state(read_seed_log(directory.log), step)

    def _distances(self, job: JobRecord, step: int) -> dict[str, float | None]:
        """How far a version of a continual job is from the base and from the live version. It blocks."""
        if not job.continual:
            return {}
        # From the adapters: the engine may have removed the state of the live version, and replaying a log takes long.
        update = read_peft(self.state.checkpoint(job.id, step))
        live = self.store.job(job.id).live.get("step")
        away = None if live is None else drift.distance(update, read_peft(self.state.checkpoint(job.id, live)))
        return {"update_norm": drift.norm(update.values()), "distance_from_live": away}

    def last_checkpoint(self, job: JobRecord) -> str | None:
        """Name of the newest checkpoint, or None. It blocks."""
        kept = self.store.all("checkpoints", parent=job.id)
        return kept[-1]["fine_tuned_model_checkpoint"] if kept else None

    # --- at its end ---------------------------------------------------------------------------------------------------

    async def model(self, job: JobRecord, progress: Progress) -> tuple[str | None, list[Any]]:
        """Give the model of a job its final name.

        Returns:
            The name, and events. The name is None if the engine does not serve the model; an event says why.
        """
        name = final_name(job)
        if job.exclusive:
            await self._merged(job, progress, name)
            return name, [_created(name)]
        step = given_back(progress.evaluations, progress.step, keeps_best=job.keeps_best)
        # It cannot return False here: the job has ended, so its log is closed and has every step.
        await asyncio.to_thread(self._export_adapter, job, step)
        try:
            await self.names.announce(job, name, step, "final")
        except ZOError as error:
            return None, [event(f"The fine-tuned model is not served: {error}", "warn")]
        return name, [_created(name)]

    async def _merged(self, job: JobRecord, progress: Progress, name: str) -> None:
        log = await asyncio.to_thread(read_seed_log, self.job_dir(job).log)
        await asyncio.to_thread(export_merged, job.model_path, log, self.state.merged(job.id))
        await self.names.announce(job, name, progress.step, "merged")
        if job.keep_base:
            self.names.name_base(name)
        else:
            await self.restore_base(job)

    async def restore_base(self, job: JobRecord) -> None:
        """Give the base the weights from before a `fold` job. Jobs that wait for that go on.

        A job that has folded nothing has changed nothing, and the base may belong to another job by now.
        """
        if (await self.client.call("zo_stats"))["base_owner"] == job.id:
            await self.client.call("zo_restore_base", job.id)

    def result_file(self, job: JobRecord) -> str:
        """Keep the table of the job's metrics; returns the file's id. It blocks."""
        return str(self.files.keep_result(result_csv(self.job_dir(job)), f"{job.id}-results.csv", job.owner)["id"])


def _created(name: str) -> dict[str, Any]:
    return event(f"New fine-tuned model created: {name}")


def _evaluation_pending(job: JobRecord, progress: Progress, step: int) -> bool:
    interval = job.hyperparameters["eval_interval"]
    due = job.validation_file is not None and (step % interval == 0 or step == progress.total)
    return due and all(known["step"] != step for known in progress.evaluations)


def log_position(directory: JobDir) -> int:
    """Number of steps in a job's seed log, from which the next start goes on; 0 if there is no readable log."""
    try:
        return read_seed_log(directory.log).num_steps if directory.log.exists() else 0
    except CorruptLogError:
        return 0
