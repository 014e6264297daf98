"""Writes files so that a crash leaves the old file or the new one, never a part of either.

A new file or directory is at most as open as the directory around it. Files in a server's private state directory thus
stay private, whichever process writes them and whatever its umask is.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from vllm_zo.errors import JobError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. If the block raises nothing, its file is fsynced and takes the name `path`.

    Raises:
        JobError: the file cannot be written (disk full, no permission); a file of that name stays as it was.
    """
    # Engines on several machines write one file at the same time, and processes in containers have equal numbers.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        make_directory(path.parent)
        yield temporary
        _close_to_others(temporary)
        _fsync(temporary, os.O_RDONLY)  # before the rename: after a crash the name must not lead to an empty file
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


def make_directory(path: Path) -> None:
    """Make a directory and those above it that are missing. Raises OSError: one of them cannot be made."""
    if path.exists():  # where it is a file, what is made in it fails as it should: "Not a directory"
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)  # another process may have made it in the meantime
    _close_to_others(path)


def _close_to_others(path: Path) -> None:
    """Take away the permissions of group and others that they do not have on the directory around `path`."""
    mode, around = (stat.S_IMODE(os.stat(place).st_mode) for place in (path, path.parent))
    if mode & ~around & 0o077:
        path.chmod(mode & (around | 0o700))


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by a file holding `data`. Raises JobError as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _fsync(path: Path, flags: int) -> None:
    """Force a file, or the names in a directory, to disk. A rename reaches the disk with its directory only."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
