"""The state directory: everything the server must not forget.

server.db           SQLite: files, jobs, events, checkpoints, models
files/<file id>     uploaded data and result files, as bytes
jobs/<job id>/      the engine's directory of a job: tokenised data, seed log, snapshots, metrics.jsonl
adapters/<job id>/  one PEFT directory a checkpoint
server.lock         held by the server that owns the directory
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Self

from vllm_zo.errors import ConfigError


class StateDir:
    """Paths in a state directory, and its lock. Names come from ids that the server makes, never from a client."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.database = self.root / "server.db"
        self._lock: int | None = None

    def file(self, file_id: str) -> Path:
        return self.root / "files" / file_id

    def job(self, job_id: str) -> Path:
        return self.root / "jobs" / job_id

    def checkpoint(self, job_id: str, step: int) -> Path:
        return self.root / "adapters" / job_id / f"step-{step}"

    def merged(self, job_id: str) -> Path:
        """The whole model that a `fold` job gives back."""
        return self.root / "adapters" / job_id / "merged"

    def acquire(self) -> Self:
        """Make the directory if need be, and become its owner until `release` or the end of the process.

        Raises:
            ConfigError: it cannot be made, or another server owns it.
        """
        try:
            for part in ("files", "jobs", "adapters"):
                (self.root / part).mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"state directory {self.root}: cannot be used: {error.strerror}.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ConfigError(
                f"state directory {self.root}: another server owns it (process {owner}); stop that one, or give "
                "this one a directory of its own with --zo-state-dir."
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._lock = descriptor
        return self

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)  # and with it the lock
            self._lock = None
