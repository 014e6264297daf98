"""A run of a coordinator that may be started again: what has to outlive it lies beside the log, in `cluster.json`."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.cluster.coordinator import Coordinator
from vllm_zo.engine.job import Job
from vllm_zo.engine.load_job import EngineFacts, load_job
from vllm_zo.errors import ConfigError, JobError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.status import JobStatus


@dataclass(frozen=True)
class RunNote:
    """The content of `cluster.json`.

    Attributes:
        run: names the run. A job that is resumed later has another one.
        epoch: of the run's newest coordinator.
        before: records that the metrics had when the run began; None: it has made none.
        ended: whether the run has ended.
    """

    run: str
    epoch: int
    before: int | None = None
    ended: bool = False

    @classmethod
    def read(cls, directory: JobDir) -> Self | None:
        return cls(**json.loads(directory.cluster.read_text())) if directory.cluster.exists() else None


class HostedRun:
    """A run and its coordinator.

    Args:
        run: None: the one that the directory tells of, because this is its second coordinator.

    Raises:
        ZOError: the job cannot begin.
    """

    def __init__(self, run: str | None, directory: JobDir, facts: EngineFacts, min_engines: int) -> None:
        try:
            job: Job = load_job(directory, facts, None)  # first: where there is no such directory, none is made
            note = RunNote.read(directory)
            if run is None and note is not None:
                run = note.run
            assert run is not None, "a directory that an engine knows was begun"
            # Also higher than that of another job: its answers may still be under way.
            epoch = max(int(time.time() * 1e3), 0 if note is None else note.epoch + 1)
            before = None if note is None or note.run != run else note.before
            self._note = RunNote(run, epoch, before)
            write_atomically(directory.cluster, json.dumps(asdict(self._note)).encode())
            self.coordinator = Coordinator(job, epoch, min_engines=min_engines)
        except OSError as error:
            raise ConfigError(f"{directory.path}: {error.strerror} on the coordinator's node; {SHARED}") from error
        except JobError as error:
            raise ConfigError(f"{error} That was on the coordinator's node; {SHARED}") from error
        self._directory = directory
        self._earlier = 0
        """Records that coordinators before this one have made of the run."""
        self._saved = True
        self._ended_at: float | None = None

    @property
    def run_id(self) -> str:
        return self._note.run

    @property
    def ended(self) -> bool:
        return self.coordinator.job.status.ended

    def hangs(self, limit_s: float) -> bool:
        """Whether the job ended more than `limit_s` ago, and some engine has not forgotten it."""
        since = self._ended_at
        return since is not None and not self.coordinator.ended and time.monotonic() - since > limit_s

    def note(self) -> None:
        """Keep beside the log what a next coordinator would have to know. A full disk can wait."""
        recorder = self.coordinator.job.recorder
        if self._note.before is None and not recorder.waiting:
            self._change(replace(self._note, before=self._in_file() - recorder.records(0)[1]))
        elif self._note.before is not None and not recorder.waiting and not self._counted:
            self._counted = True
            self._earlier = self._in_file() - recorder.records(0)[1] - self._note.before
        if self.ended and not self._note.ended:
            self._ended_at = time.monotonic()
            self._change(replace(self._note, ended=True))
        if not self._saved:
            with contextlib.suppress(JobError):
                write_atomically(self._directory.cluster, json.dumps(asdict(self._note)).encode())
                self._saved = True

    def _change(self, note: RunNote) -> None:
        self._note, self._saved, self._counted = note, False, True

    _counted = False
    """Whether `_earlier` is known."""

    def _in_file(self) -> int:
        return len(self._directory.read_metrics())

    def status(self, since: int) -> dict[str, Any]:
        """`Coordinator.status`, with the records of all coordinators of the run. The run counts as running until every
        engine has forgotten it: then its versions are on disk."""
        answer = self.coordinator.status(max(0, since - self._earlier))
        if self.ended and not self.coordinator.ended:
            answer["status"] = JobStatus.RUNNING
        if not self._counted:
            return answer | {"records": [], "next": since}
        answer["next"] += self._earlier
        if since < self._earlier:
            assert self._note.before is not None
            answer["records"] = self._directory.read_metrics()[self._note.before + since :]
        return answer

    @staticmethod
    def ended_before(run: str, directory: JobDir, since: int) -> dict[str, Any] | None:
        """`status` of a run that ended with an earlier coordinator; None: it did not."""
        try:
            note, summary = RunNote.read(directory), directory.read_summary()
        except OSError:  # what begins the run tells of it
            return None
        if note is None or note.run != run or not note.ended or summary is None:
            return None
        records = directory.read_metrics()[note.before or 0 :]
        return {**summary, "records": records[since:], "next": len(records), "engines": {}}


SHARED = "the directory of a job must be on a file system that all nodes of the Ray cluster share."
