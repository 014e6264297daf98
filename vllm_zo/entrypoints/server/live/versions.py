"""The versions of continual jobs that answer to `live:<job id>`: the gate, the canary, promoting and rolling back.

Each version is a model of its own (`ft:...:ckpt-step-<n>`), and the live name points at one of them. So a change holds
for the next request, requests in flight keep their weights, and vLLM's prefix cache, which goes by the model's name,
never mixes two versions.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.http.events import EventHub
from vllm_zo.entrypoints.server.http.schemas import event
from vllm_zo.entrypoints.server.jobs.progress import Progress, plain
from vllm_zo.entrypoints.server.jobs.request import JobRequest, LiveRule, read_request
from vllm_zo.entrypoints.server.live.state import LiveState, refusal
from vllm_zo.entrypoints.server.models.names import LOADED, ModelNames, checkpoint_name, live_alias
from vllm_zo.entrypoints.server.models.vllm_models import Serving
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.entrypoints.server.state.store import Store

MIN_SCORES = 20
"""Scores that both versions need before a canary is judged by them."""


class LiveVersions:
    """Changes which version is live. Its coroutines belong to vLLM's event loop.

    The record is written before the name is pointed: after a crash `restore` points it again.
    """

    def __init__(self, store: Store, names: ModelNames, serving: Serving, hub: EventHub) -> None:
        self._store, self._names, self._serving, self._hub = store, names, serving, hub
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._canaries: dict[str, tuple[float, str]] = {}
        """Live name -> (share of requests, model that answers them)."""
        self._random = random.Random()

    def restore(self) -> None:
        """Point the live names as an earlier server did. Call it once, when the models are served again."""
        for body in self._store.all("jobs"):
            if body.get("live"):
                self._point(JobRecord.from_json(body), LiveState.of(body["live"]))

    # --- what answers -------------------------------------------------------------------------------------------------

    def choose(self, name: str) -> str:
        """The model that answers the next request for `name`: now and then a canary, else `name` itself."""
        share, canary = self._canaries.get(name, (0.0, ""))
        return canary if share and self._random.random() < share else name

    @property
    def has_canaries(self) -> bool:
        return bool(self._canaries)

    def _point(self, job: JobRecord, live: LiveState) -> None:
        name = live_alias(job.id)
        if live.step is not None and self._serving.serves(checkpoint_name(job, live.step)):
            self._serving.point(name, checkpoint_name(job, live.step))
        self._canaries.pop(name, None)
        share = _rule(job).canary
        if share and live.canary is not None and self._serving.serves(checkpoint_name(job, live.canary)):
            self._canaries[name] = share, checkpoint_name(job, live.canary)

    # --- what changes it ----------------------------------------------------------------------------------------------

    async def consider(self, job: JobRecord, progress: Progress, step: int) -> list[dict[str, Any]]:
        """Let a version of a continual job that is served now go live, or become the canary, if the gate lets it;
        returns events."""
        async with self._lock(job.id):
            live = LiveState.of((await asyncio.to_thread(self._store.job, job.id)).live)
            compares, rule = job.validation_file is not None, _rule(job)
            if live.held or (compares and progress.evaluation(step) is None):
                return []  # between two evaluations nothing is known of a version
            events = []
            if live.canary is not None:
                why = refusal(
                    rule, progress.evaluation(live.canary), self._reference(progress, live), compares=compares
                )
                why = why or await asyncio.to_thread(self._scored_worse, job, live)
                if why is None:
                    events.append(event(f"Version {live.canary} is live"))
                    live = live.goes_live(live.canary)
                else:
                    events.append(event(f"The canary, version {live.canary}, does not go live: {why}", "warn"))
                    live = LiveState(live.step, None, live.history, live.held)
            why = refusal(rule, progress.evaluation(step), self._reference(progress, live), compares=compares)
            if why is not None:
                events.append(event(f"Version {step} does not go live: {why}", "warn"))
            elif rule.canary and live.step is not None:
                events.append(event(f"Version {step} is the canary: it answers {rule.canary:.0%} of the requests"))
                live = LiveState(live.step, step, live.history, live.held)
            else:
                events.append(event(f"Version {step} is live"))
                live = live.goes_live(step)
            await self._write(job, live)
            return events

    async def promote(self, job_id: str, step: int) -> LiveState:
        """Let a version go live whatever the gate says; versions go live by themselves again from now on.

        Raises:
            APIError: 404, there is no such job or version; 409, the version is not served.
        """
        job = await self._continual(job_id)
        async with self._lock(job_id):
            await self._check_served(job, step)
            live = LiveState.of((await asyncio.to_thread(self._store.job, job_id)).live).promoted(step)
            await self._write(job, live, event(f"Version {step} is live: it was promoted"))
            return live

    async def rollback(self, job_id: str, step: int) -> LiveState:
        """Go back from version `step`, which must be the live one (two clients do not roll back twice), to the one
        before. Nothing goes live by itself until a client promotes a version.

        Raises:
            APIError: 404, there is no such job; 409, another version is live, or none was before it.
        """
        job = await self._continual(job_id)
        async with self._lock(job_id):
            before = LiveState.of((await asyncio.to_thread(self._store.job, job_id)).live)
            if before.step != step:
                raise APIError(409, f"step={step}: the live version of job {job_id} is {before.step}.", "step")
            live = before.rolled_back()
            assert live.step is not None
            await self._check_served(job, live.step)
            await self._write(job, live, event(f"Version {live.step} is live: {step} was rolled back", "warn"))
            return live

    async def _write(self, job: JobRecord, live: LiveState, *events: dict[str, Any]) -> None:
        await asyncio.to_thread(self._store.change_job, job.id, *events, live=live.to_json())
        self._point(job, live)
        self._hub.notify(job.id)

    async def prune(self, job: JobRecord) -> None:
        """Remove the versions of a continual job that are older than its newest ones and not needed."""
        async with self._lock(job.id):
            live = LiveState.of((await asyncio.to_thread(self._store.job, job.id)).live)
            kept = await asyncio.to_thread(self._store.all, "checkpoints", parent=job.id)
            older = kept[: -job.hyperparameters["keep_versions"]]
            for checkpoint in older:
                if checkpoint["step_number"] not in live.needed():
                    await self._names.unload(checkpoint["fine_tuned_model_checkpoint"], delete=True)
                    await asyncio.to_thread(self._store.delete, "checkpoints", checkpoint["id"])

    # --- what is known ------------------------------------------------------------------------------------------------

    async def versions(self, job_id: str) -> dict[str, Any]:
        """The versions of a job with their numbers, newest first, and which of them answer. Raises APIError: 404."""
        job = await self._continual(job_id)
        live = LiveState.of(job.live)
        checkpoints = await asyncio.to_thread(self._store.all, "checkpoints", parent=job_id)
        scores = await asyncio.to_thread(self.scores, job)
        data = [
            {
                "object": "fine_tuning.job.version",
                "step": checkpoint["step_number"],
                "model": checkpoint["fine_tuned_model_checkpoint"],
                "created_at": checkpoint["created_at"],
                "status": _status(checkpoint["step_number"], live),
                "metrics": plain(checkpoint["metrics"]),
                "feedback": scores.get(checkpoint["fine_tuned_model_checkpoint"], {"count": 0, "mean_score": None}),
            }
            for checkpoint in reversed(checkpoints)
        ]
        return {
            "object": "list",
            "data": data,
            "live": live.step,
            "canary": live.canary,
            "canary_share": _rule(job).canary if live.canary is not None else 0.0,
            "held": live.held,
        }

    def scores(self, job: JobRecord) -> dict[str, dict[str, Any]]:
        """Model -> number and mean of the scores that clients gave its answers. It blocks."""
        means = self._store.means("feedback", "score", by="model", parent=job.id)
        return {model: {"count": count, "mean_score": mean} for model, (count, mean) in means.items()}

    def _scored_worse(self, job: JobRecord, live: LiveState) -> str | None:
        assert live.canary is not None
        if live.step is None:
            return None
        scores, none = self.scores(job), {"count": 0, "mean_score": 0.0}
        ours, theirs = (scores.get(checkpoint_name(job, step), none) for step in (live.canary, live.step))
        if min(ours["count"], theirs["count"]) < MIN_SCORES or ours["mean_score"] >= theirs["mean_score"]:
            return None
        return f"clients score it {ours['mean_score']:.3g} on the average, and the live one {theirs['mean_score']:.3g}"

    def _reference(self, progress: Progress, live: LiveState) -> Mapping[str, Any] | None:
        """The evaluation to compare with: that of the live version, or of the base."""
        return progress.evaluation(live.step or 0)

    async def _continual(self, job_id: str) -> JobRecord:
        job = await asyncio.to_thread(self._store.job, job_id)
        if not job.continual:
            raise APIError(409, f'job {job_id} has no live version: only a job with "continual": true has.')
        return job

    async def _check_served(self, job: JobRecord, step: int) -> None:
        name = checkpoint_name(job, step)
        model = await asyncio.to_thread(self._store.find, "models", name)
        if model is None:
            raise APIError(404, f"step={step}: job {job.id} has no such version.", "step")
        if model["status"] != LOADED or not self._serving.serves(name):
            raise APIError(409, f"step={step}: {name} is not served.", "step")

    def _lock(self, job_id: str) -> asyncio.Lock:
        return self._locks.setdefault(job_id, asyncio.Lock())


def _status(step: int, live: LiveState) -> str:
    return {live.canary: "canary", live.step: "live"}.get(step, "kept")


def _rule(job: JobRecord) -> LiveRule:
    rule = read_request(JobRequest.model_validate(job.request)).live
    assert rule is not None, "every continual job has one"
    return rule
