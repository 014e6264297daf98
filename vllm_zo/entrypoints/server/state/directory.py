"""The state directory: everything that the server needs after a restart.

server.db           SQLite: files, jobs, events, checkpoints, models
files/<file id>     uploaded data and result files, as bytes
jobs/<job id>/      the engine's directory of a job: tokenised data, seed log, snapshots, metrics.jsonl
adapters/<job id>/  one PEFT directory a checkpoint
server.lock         held by the server that owns the directory; its text is that process's id

Only its owner may read it (0700, 0600): it holds training data and the answers of models.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from vllm_zo.errors import ConfigError


class StateDir:
    """Paths in a state directory, and its lock. Names come from ids that the server makes, never from a client."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.database = self.root / "server.db"
        # Not thread-local: a test makes its app in one thread and ends it in another, which must release the lock.
        self._lock = FileLock(self.root / "server.lock", timeout=0, mode=0o600, thread_local=False)

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
        """Make the directory if it is missing, and own it until `release` or the end of the process.

        Raises:
            ConfigError: it cannot be made, or another server owns it.
        """
        try:
            for directory in (self.root, *(self.root / part for part in ("files", "jobs", "adapters"))):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire()
            # With the lock: only the owner may change permissions and the name of the owner.
            self._close_to_others()
            self._sweep()
            Path(self._lock.lock_file).write_text(f"{os.getpid()}\n")
        except Timeout:
            owner = Path(self._lock.lock_file).read_text(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"state directory {self.root}: another server owns it (process {owner}); stop that one, or give "
                "this one a directory of its own with --zo-state-dir."
            ) from None
        except OSError as error:
            self.release()
            raise ConfigError(f"state directory {self.root}: cannot be used: {error.strerror}.") from error
        return self

    def _close_to_others(self) -> None:
        """Take every permission from group and others, which had some in a directory of an earlier version.

        It also makes the database, empty: SQLite gives its files beside the database the database's permissions.
        """
        self.database.touch(mode=0o600)
        for path in (self.root, *self.root.rglob("*")):
            # Not the target of a link: chmod follows links, and a target outside is not ours.
            mode = stat.S_IMODE(path.lstat().st_mode)
            if mode & 0o077 and not path.is_symlink():
                path.chmod(mode & 0o700)

    def _sweep(self) -> None:
        """Remove what a killed server was writing: half files beside those of jobs, and downloads of an earlier
        version. (`Files` and `ModelNames` know which of their files are whole.)"""
        for path in (*self.root.glob("jobs/*/.*.tmp"), *self.root.glob(".download-*.tar")):
            path.unlink()

    def release(self) -> None:
        self._lock.release()
