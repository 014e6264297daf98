"""What a job leaves on disk while it runs: the seed log, `metrics.jsonl` and a final `summary.json`."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.checkpoint.header import SeedLogHeader
from vllm_zo.checkpoint.seed_log import SeedLogWriter
from vllm_zo.errors import JobError
from vllm_zo.methods.base import ModuleShape

logger = logging.getLogger("vllm.zo")


class JobRecorder:
    """Never blocks the step on the disk: the seed log has its own thread, metrics are one small buffered write a step.

    Args:
        make_header: builds the seed log's header once the workers have said which modules are in scope; None for a job
            that only evaluates and has no log.
        resume: append to an existing log instead of starting one.
    """

    def __init__(
        self, directory: Path, make_header: Callable[[Sequence[ModuleShape]], SeedLogHeader] | None, resume: bool
    ) -> None:
        self.directory = directory
        self._records: list[dict[str, Any]] = []
        self._forgotten = 0
        """Records of this run that are on disk only, since it ended: an engine lives longer than its jobs."""
        self.waiting = True
        """No step may be scheduled before the workers have answered with their modules: the log needs its header."""
        self._make_header = make_header
        self._resume = resume
        self._log: SeedLogWriter | None = None
        self._metrics: TextIO | None = None
        self._metrics_error: JobError | None = None

    def open(self, modules: Sequence[ModuleShape]) -> None:
        """Start or continue the files.

        Raises:
            ConfigError: the seed log is another job's, or in use.
            JobError: the disk refuses.
        """
        path = self.directory / "metrics.jsonl"
        if self._make_header is not None:
            self._log = SeedLogWriter(self.directory / "seeds.log", self._make_header(modules), resume=self._resume)
            if self._resume and path.exists():
                write_atomically(path, _records_until(path, self._log.next_step))
        # Line by line: a process that is killed leaves whole lines, and whoever follows the file sees each at once.
        try:
            self._metrics = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise _cannot_write(path, error) from error
        self.waiting = False

    @property
    def error(self) -> JobError | None:
        """Why the disk does not hold everything; the steps until then can be resumed from the log."""
        return (self._log.error if self._log is not None else None) or self._metrics_error

    def step(self, step: int, learning_rate: float, coefficients: list[float], finite: bool) -> None:
        assert self._log is not None
        self._log.append(step, learning_rate, coefficients, finite)

    def metrics(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        assert self._metrics is not None
        try:
            self._metrics.write(json.dumps(record) + "\n")
        except OSError as error:  # the engine serves others: a full disk must not reach its step loop
            self._metrics_error = _cannot_write(self.directory / "metrics.jsonl", error)

    def records(self, since: int) -> tuple[list[dict[str, Any]], int]:
        """Metric records of this run from number `since` on, and how many there are in all."""
        total = self._forgotten + len(self._records)
        if since >= self._forgotten:
            return self._records[since - self._forgotten :], total
        lines = (self.directory / "metrics.jsonl").read_bytes().splitlines()
        return [json.loads(line) for line in lines[-total:][since:]], total

    def forget(self) -> None:
        """Free the records of a run that has ended. Those the disk did not take stay."""
        if self.error is None and not self.waiting:
            self._forgotten += len(self._records)
            self._records.clear()

    def close(self) -> None:
        """Write what is left and stop. Never raises: afterwards `error` says whether everything is on disk."""
        if self._log is not None:
            self._log.close()
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # the line that did not fit was reported when it was written
                self._metrics.close()

    def summarise(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`; where that fails the run itself is none the worse."""
        try:
            write_atomically(self.directory / "summary.json", json.dumps(summary, indent=1).encode())
        except JobError as error:
            logger.error("%s", error)


def _cannot_write(path: Path, error: OSError) -> JobError:
    return JobError(f"cannot write {path}: {error.strerror}; free space, then resume.")


def _records_until(path: Path, num_steps: int) -> bytes:
    """The records of the first `num_steps` steps: after a crash `metrics.jsonl` may be ahead of the seed log."""
    lines = path.read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= num_steps)
