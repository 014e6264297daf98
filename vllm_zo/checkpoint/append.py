"""A file that grows on a disk that may be full. Bytes that the disk refuses stay in memory and are written later."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vllm_zo.errors import JobError


class AppendFile:
    """Holds bytes in memory until the file has them. It is not thread-safe: its owner must hold a lock.

    Args:
        path: an existing file.
        size: bytes of the file to keep; the rest is cut off. None: keep all of it.
        unit: the word for lines in `error`.
        durable: bytes leave memory only after an fsync that covers them. After a failed fsync the same bytes are
            written again, because the failure may have dropped pages that a later fsync reports as clean.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, size: int | None = None, *, unit: str = "lines", durable: bool) -> None:
        self.path, self.unit, self.durable = path, unit, durable
        self.before_write: Callable[[], None] | None = None
        """Called before each write: brings to disk what must not be behind this file. It may raise OSError."""
        self.error: JobError | None = None
        """Why the last flush failed; None again once a later one has written everything."""
        self._pending = bytearray()
        self._closed = False
        self._fd = os.open(path, os.O_RDWR)
        try:
            if size is not None:
                os.ftruncate(self._fd, size)
                os.fsync(self._fd)
            self._offset = os.lseek(self._fd, 0, os.SEEK_END)
        except BaseException:
            os.close(self._fd)
            raise

    def add(self, data: bytes) -> None:
        self._pending += data

    def flush(self) -> None:
        """Write the bytes that are held. A disk that refuses raises no error here: look at `error` afterwards."""
        if not self._pending:
            return
        try:
            if self.before_write is not None:
                self.before_write()
            self._write(bytes(self._pending), self._offset)
            if self.durable:
                os.fsync(self._fd)
        except OSError as error:
            # `_offset` and `_pending` stay: the next try writes the same bytes to the same place.
            self.error = self._refused(error)
            return
        self._offset += len(self._pending)
        self._pending.clear()
        self.error = None

    def sync(self) -> None:
        """Wait until the disk has what `flush` has written. Raises OSError. Any thread may call it until `close`."""
        os.fsync(self._fd)

    def hand_over(self) -> bool:
        """Write the bytes without waiting for the disk: a kill of this process cannot lose them then, a power cut can.

        `flush` writes them once more, in its order. Returns whether the file took them; if not, `error` says why.
        """
        try:
            self._write(bytes(self._pending), self._offset)
        except OSError as error:
            self.error = self._refused(error)
        return self.error is None

    def _write(self, data: bytes, offset: int) -> None:
        """Write all of `data`; a full disk may accept a part of it before it refuses the rest."""
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def _refused(self, error: OSError) -> JobError:
        count = self._pending.count(b"\n")
        return JobError(f"{self.path}: {error.strerror} with {count} {self.unit} not yet on disk; free space.")

    def close(self) -> None:
        """Flush once more and close the file. A second call does nothing."""
        if self._closed:
            return
        self.flush()
        os.close(self._fd)
        self._closed = True  # twice, and `os.close` would close what another thread has opened since
