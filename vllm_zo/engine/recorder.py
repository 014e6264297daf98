"""What a job leaves on disk while it runs: the seed log, `metrics.jsonl` and a final `summary.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.checkpoint.header import SeedLogHeader
from vllm_zo.checkpoint.seed_log import SeedLogWriter
from vllm_zo.methods.base import ModuleShape


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
        self.records: list[dict[str, Any]] = []
        self.waiting = True
        """No step may be scheduled before the workers have answered with their modules: the log needs its header."""
        self._make_header = make_header
        self._resume = resume
        self._log: SeedLogWriter | None = None
        self._metrics: TextIO | None = None

    def open(self, modules: Sequence[ModuleShape]) -> None:
        path = self.directory / "metrics.jsonl"
        if self._make_header is not None:
            self._log = SeedLogWriter(self.directory / "seeds.log", self._make_header(modules), resume=self._resume)
            if self._resume and path.exists():
                write_atomically(path, _records_until(path, self._log.next_step))
        # Line by line: a process that is killed leaves whole lines, and whoever follows the file sees each at once.
        self._metrics = path.open("a", encoding="utf-8", buffering=1)
        self.waiting = False

    @property
    def error(self) -> Exception | None:
        return self._log.error if self._log is not None else None

    def step(self, step: int, learning_rate: float, coefficients: list[float], finite: bool) -> None:
        assert self._log is not None
        self._log.append(step, learning_rate, coefficients, finite)

    def metrics(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        assert self._metrics is not None
        self._metrics.write(json.dumps(record) + "\n")

    def close(self, summary: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.close()
        if self._metrics is not None:
            self._metrics.close()
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _records_until(path: Path, num_steps: int) -> bytes:
    """The records of the first `num_steps` steps: after a crash `metrics.jsonl` may be ahead of the seed log."""
    lines = path.read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= num_steps)
