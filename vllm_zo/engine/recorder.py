"""The files that a job writes while it runs: the seed log, `metrics.jsonl` and a final `summary.json`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_zo.checkpoint.append import AppendFile
from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.checkpoint.seed_log.format import RowsSoFar
from vllm_zo.checkpoint.seed_log.header import SeedLogHeader
from vllm_zo.checkpoint.seed_log.writer import SeedLogWriter
from vllm_zo.errors import JobError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.records import Metrics, is_evaluation
from vllm_zo.methods.plan import ModuleShape

logger = logging.getLogger("vllm.zo")

MAX_IN_MEMORY = 1_000
"""Most records of a run that are kept in memory: a continual job never stops making some. Older ones are on disk."""
RETRY_S = 0.5
"""Seconds between two tries to write to a full disk: the flush interval of the seed log's thread."""


class JobRecorder:
    """Keeps the disk out of the step: a thread writes the seed log, and metrics are one small write a step.

    Args:
        make_header: builds the seed log's header from the modules in scope, which the workers name; None for a job
            that only evaluates and has no log.
        resume: append to an existing log instead of starting one.
    """

    def __init__(
        self, directory: JobDir, make_header: Callable[[Sequence[ModuleShape]], SeedLogHeader] | None, resume: bool
    ) -> None:
        self.directory = directory
        self._records: list[Metrics] = []
        self._forgotten = 0
        """Number of records of this run that are on disk only. `forget` frees them: an engine outlives its jobs."""
        self.waiting = True
        """True until the workers have named the modules: the log's header needs them, so no step may run before."""
        self._make_header = make_header
        self._resume = resume
        self._log: SeedLogWriter | None = None
        self._metrics: AppendFile | None = None
        self._retry_at = 0.0
        """When to write the metrics again after the disk refused them (`time.monotonic`)."""

    def open(self, modules: Sequence[ModuleShape], *, evaluates_again: bool) -> None:
        """Start or continue the files.

        Args:
            evaluates_again: whether a job that continues begins with an evaluation of the state that its log leads to.

        Raises:
            ConfigError: the seed log is another job's, or in use.
            CorruptLogError: the log's header cannot be read.
            JobError: the disk refuses a file.
        """
        path = self.directory.metrics
        if self._make_header is not None:
            # The log first: it takes the lock of the job's files, and says how many steps the metrics may have.
            self._log = SeedLogWriter(self.directory.log, self._make_header(modules), resume=self._resume)
            if self._resume and path.exists():
                write_atomically(path, _records_until(path, self._log.next_step, evaluates_again=evaluates_again))
        if not path.exists():
            write_atomically(path, b"")  # as private as its directory
        try:
            self._metrics = AppendFile(path, durable=False)
        except OSError as error:
            raise JobError(f"cannot write {path}: {error.strerror}; free space, then resume.") from error
        if self._log is not None:
            self._log.follow(self._metrics)
        self.waiting = False

    def header(self, modules: Sequence[ModuleShape]) -> SeedLogHeader | None:
        """The header of the log; None for a job without one."""
        return None if self._make_header is None else self._make_header(modules)

    @property
    def error(self) -> JobError | None:
        """Why the disk does not hold everything yet; None once it does. Meanwhile the job waits."""
        return (self._log.error if self._log is not None else None) or (self._metrics.error if self._metrics else None)

    def retry(self) -> None:
        """Try again to write metrics that the disk has refused, twice a second at most. The log's thread does the same
        for the log."""
        if self._metrics is not None and self._metrics.error is not None and time.monotonic() >= self._retry_at:
            self._metrics.flush()
            self._retry_at = time.monotonic() + RETRY_S

    def sync(self) -> None:
        """Write everything now. Afterwards `error` says whether the disk has it."""
        for file in (self._log, self._metrics):
            if file is not None:
                file.flush()

    def hand_over(self) -> bool:
        """Let the log's file have all steps now, though perhaps not the disk; returns whether it has. If not, `error`
        says why."""
        return self._log is None or self._log.hand_over()

    def step(
        self,
        step: int,
        learning_rate: float,
        coefficients: list[float],
        finite: bool,
        appended: RowsSoFar | None = None,
    ) -> None:
        assert self._log is not None
        self._log.append(step, learning_rate, coefficients, finite, appended)

    def metrics(self, record: Metrics) -> None:
        self._records.append(record)
        assert self._metrics is not None
        # Flushed one by one: a process that is killed leaves whole lines, and a reader of the file sees every step.
        self._metrics.add(json.dumps(record).encode() + b"\n")
        self._metrics.flush()
        if len(self._records) >= 2 * MAX_IN_MEMORY and self.error is None:
            self._forgotten += MAX_IN_MEMORY
            del self._records[:MAX_IN_MEMORY]

    def records(self, since: int) -> tuple[list[Metrics], int]:
        """Metric records of this run from number `since` on, and the number of all its records."""
        total = self._forgotten + len(self._records)
        if since >= self._forgotten:
            return self._records[since - self._forgotten :], total
        # The file may begin with records of an earlier run of the job: this run's are the last ones.
        lines = (self.directory.metrics).read_bytes().splitlines()
        return [json.loads(line) for line in lines[-total:][since:]], total

    def forget(self) -> None:
        """Free the records of a run that has ended, unless the disk has refused some: then they exist here only."""
        if self.error is None and not self.waiting:
            self._forgotten += len(self._records)
            self._records.clear()

    def close(self) -> None:
        """Write what is left and stop. Afterwards `error` says whether everything is on disk."""
        if self._log is not None:
            self._log.close()
        if self._metrics is not None:
            self._metrics.close()

    def summarise(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`. A failure goes to the log only: the run does not need this file."""
        try:
            write_atomically(self.directory.summary, json.dumps(summary, indent=1).encode())
        except JobError as error:
            logger.error("%s", error)


def _records_until(path: Path, num_steps: int, *, evaluates_again: bool) -> bytes:
    """The records of the first `num_steps` steps: after a crash `metrics.jsonl` may be ahead of the seed log.

    It leaves out an evaluation that the job repeats, which would otherwise have two records.
    """

    def is_kept(record: Metrics) -> bool:
        again = evaluates_again and is_evaluation(record) and record["step"] == num_steps
        return record["step"] <= num_steps and not again

    lines = path.read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if line.endswith(b"\n") and is_kept(json.loads(line)))
