"""Feedback of clients on answers that versions of a continual job gave: kept, learnt, forgotten."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.http.schemas import now
from vllm_zo.entrypoints.server.jobs.request import FeedbackRule, JobRequest, read_request
from vllm_zo.entrypoints.server.keys.current import acting_for
from vllm_zo.entrypoints.server.live.answers import read_answer
from vllm_zo.entrypoints.server.live.examples import GrowingJobs
from vllm_zo.entrypoints.server.live.lesson import lesson_of
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.entrypoints.server.state.store import Store
from vllm_zo.errors import ZOError
from vllm_zo.jobs.status import UNFINISHED

logger = logging.getLogger("vllm.zo.server")

MAX_ANSWERS = 100_000
"""Most answers of a job that are kept, whatever its `retention_days`."""
SWEEP_S = 60.0
DAY_S = 86_400


class Feedback:
    """Keeps answers of the jobs that ask for it, and turns what clients say of them into rows of those jobs."""

    def __init__(self, store: Store, growing: GrowingJobs, render: Any) -> None:
        self._store, self._growing, self._render = store, growing, render
        self._rules: dict[str, FeedbackRule] = {}
        """Unfinished jobs that ask for feedback."""
        self._swept = 0.0

    def restore(self) -> None:
        """Find the jobs that ask for feedback. Call it once, before requests come."""
        for job in self._store.jobs(UNFINISHED):
            self.watch(job)

    def watch(self, job: JobRecord) -> None:
        """Keep the answers of a job from now on, if it asks for it."""
        if (rule := _rule(job)) is not None:
            self._rules[job.id] = rule

    def forget(self, job_id: str) -> None:
        """Keep no further answers of a job: it has ended."""
        self._rules.pop(job_id, None)

    @property
    def any(self) -> bool:
        """Whether any job asks for feedback."""
        return bool(self._rules)

    def job_of(self, model: str) -> str | None:
        """The job whose version a model's name means, if its answers are kept."""
        kind, _, rest = model.partition(":")
        if kind in ("job", "live"):
            return rest if rest in self._rules else None
        parts = set(rest.split(":")) if kind == "ft" else set()
        return next((job_id for job_id in self._rules if job_id.removeprefix("ftjob-") in parts), None)

    async def keep(self, job_id: str, path: str, asked: dict[str, Any], body: bytes) -> None:
        """Keep an answer. It never fails the request: an answer that the disk refuses is not kept."""
        answer = read_answer(path, asked, body)
        if answer is None or job_id not in self._rules:
            return
        try:
            await asyncio.to_thread(self._keep, job_id, answer)
        except Exception as error:  # of a database whose disk is full, or is closed: the client has its answer
            logger.warning("job %s: the answer %s is not kept: %s", job_id, answer["id"], error)

    def _keep(self, job_id: str, answer: dict[str, Any]) -> None:
        with self._store.transaction():
            self._store.add("answers", {**answer, "job_id": job_id, "created_at": now()}, parent=job_id)
            if time.monotonic() - self._swept > SWEEP_S:
                self._swept = time.monotonic()
                self._sweep()

    def _sweep(self) -> None:
        """Forget answers that are older than their job's retention, with their feedback; the rows stay what they are,
        tokens of the job's data."""
        with acting_for(None):  # the answer that brought this may be one project's
            # One job after another, and only these: all jobs that the server has ever had are too much for memory.
            jobs = self._store.parents("answers") | self._store.parents("feedback")
            rules = {job_id: _rule(self._store.job(job_id)) for job_id in jobs}
        for job_id, rule in rules.items():
            assert rule is not None, "it has answers"
            before = now() - int(rule.retention_days * DAY_S)
            for table in ("answers", "feedback"):
                self._store.delete_before(table, job_id, before)
                self._store.trim(table, job_id, MAX_ANSWERS)

    async def give(self, completion_id: str, *, score: float | None, label: Any, text: str | None) -> dict[str, Any]:
        """Take in feedback on an answer. A second call with the same answers the same.

        Raises:
            APIError: 404, no such answer is kept; 409, it has other feedback, or its job has ended.
            ConfigError: the job learns nothing from this feedback.
            OSError, JobError: the disk refuses; nothing is changed.
        """
        answer = await asyncio.to_thread(self._store.find, "answers", completion_id)
        if answer is None:
            raise APIError(
                404,
                f"No such answer: {completion_id!r}. Only answers of continual jobs that ask for feedback are kept, "
                "for their retention_days.",
                "completion_id",
                "completion_not_found",
            )
        job_id, feedback_id = answer["job_id"], f"fb-{completion_id}"
        said = {"score": score, "label": label, "text": text}
        if (known := await asyncio.to_thread(self._store.find, "feedback", feedback_id)) is not None:
            if said == {name: known[name] for name in said}:
                return known
            raise APIError(
                409, f"{completion_id!r} has feedback already: delete {feedback_id!r} first.", "completion_id"
            )
        await self._growing.check(job_id)
        job = await asyncio.to_thread(self._store.job, job_id)
        rule = _rule(job)
        assert rule is not None
        appender = await asyncio.to_thread(self._growing.appender, job_id)
        lesson = await asyncio.to_thread(lesson_of, appender.objective, answer, said, rule.min_score, self._render)
        if lesson is not None:
            # The row first, under the feedback's id: if the server is killed in between, a second try appends nothing.
            await self._growing.append(job_id, [lesson.row], feedback_id, lesson.objective)
        record = {
            "id": feedback_id,
            "object": "fine_tuning.feedback",
            "created_at": now(),
            "fine_tuning_job_id": job_id,
            "completion_id": completion_id,
            "model": answer["model"],
            **said,
            "learnt": lesson is not None,
        }
        await asyncio.to_thread(self._store.add, "feedback", record, job_id)
        return record

    def find(self, feedback_id: str) -> dict[str, Any]:
        """Raises APIError: 404, there is no such feedback."""
        if (found := self._store.find("feedback", feedback_id)) is None:
            raise APIError(404, f"No such feedback: {feedback_id!r}.", "feedback_id", "feedback_not_found")
        return found

    async def delete(self, feedback_id: str) -> None:
        """Forget feedback, the answer that it was on, and the row that it made. What the job has learnt stays learnt.

        Raises:
            APIError: 404, there is no such feedback.
            JobError: the disk refuses; nothing is changed.
        """
        record = await asyncio.to_thread(self.find, feedback_id)
        if record["learnt"]:
            try:
                await self._growing.delete(record["fine_tuning_job_id"], feedback_id)
            except ZOError as error:
                raise APIError(409, str(error)) from error
        await asyncio.to_thread(self._delete, record)

    def _delete(self, record: dict[str, Any]) -> None:
        with self._store.transaction():
            self._store.delete("answers", record["completion_id"])
            self._store.delete("feedback", record["id"])


def _rule(job: JobRecord) -> FeedbackRule | None:
    return read_request(JobRequest.model_validate(job.request)).feedback
