"""Writing files so that a crash leaves the old one or the new one, never half of either."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vllm_zo.errors import JobError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; when the block ends well its file is fsynced and takes the name `path`.

    Raises:
        JobError: the file cannot be written (disk full, no permission); a file of that name stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _fsync(temporary, os.O_RDONLY)
        temporary.replace(path)
        _fsync(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise JobError(
            f"cannot write {path}: {error.strerror or error}; nothing there was changed. "
            "Free space or choose another directory, then try again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by a file holding `data`. Raises JobError as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _fsync(path: Path, flags: int) -> None:
    """Contents of a file, or the names in a directory: a rename is on disk only after the latter."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
