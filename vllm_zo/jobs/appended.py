"""Rows that are appended to a continual job: `appended.jsonl` in its directory.

A line is what one call appended, so that a crash leaves all rows of a call or none:

    {"key":"...","count":2,"crc":305419896,"rows":[...]} 5d3a9b11

    key    names the call, so that one that is sent again appends nothing
    count  its rows
    crc    crc32 of its rows: a row that is deleted later keeps its place in the seed log
    rows   tokenised (`EncodedExample`); empty once they are deleted
    and at the end of the line the crc32 of all before it

The front end writes the file, and tells the engine how far it may read once the disk has it. The engine enters rows at
a step, and the step's record in the seed log has their number and digest.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.checkpoint.seed_log.format import RowsSoFar, decode_line, encode_line
from vllm_zo.errors import JobError
from vllm_zo.objectives.base import EncodedExample


class Call(msgspec.Struct, frozen=True):
    """The rows of one call; see above."""

    key: str
    count: int
    crc: int
    rows: list[EncodedExample]

    @classmethod
    def of(cls, key: str, rows: Sequence[EncodedExample]) -> Call:
        return cls(key, len(rows), zlib.crc32(msgspec.json.encode(list(rows))), list(rows))

    @property
    def deleted(self) -> bool:
        return not self.rows

    def after(self, so_far: RowsSoFar) -> RowsSoFar:
        """Number and digest of all rows up to these."""
        entry = f"{self.key} {self.count} {self.crc:08x}".encode()
        return RowsSoFar(so_far.count + self.count, zlib.crc32(entry, so_far.digest))


def read_calls(path: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[Call, int]]:
    """The calls from byte `start` to byte `end` (None: to the end of what is whole), and where each one's line ends.

    It stops at a line that is cut off: the process that wrote it was killed, and nobody was told that it is there.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            start += len(line)
            if end is not None and start > end:
                return
            try:
                call = _decoder.decode(decode_line(line))
            except ValueError:  # msgspec's error is one, too
                return
            yield call, start


_decoder = msgspec.json.Decoder(Call)


class AppendedRows:
    """The writer of a job's file. There is one for a job, in the front end; it needs a lock around its calls.

    Attributes:
        size: bytes of the file that are whole and on disk.
        count: rows in them.

    Raises:
        JobError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = self.count = 0
        self._keys: set[str] = set()
        try:
            for call, end in read_calls(path):
                self.size, self.count = end, self.count + call.count
                self._keys.add(call.key)
        except OSError as error:
            raise JobError(f"{path}: {error.strerror}.") from error

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def append(self, key: str, rows: Sequence[EncodedExample]) -> None:
        """Write the rows of a call, and wait until the disk has them.

        Raises:
            JobError: the disk refuses; none of the rows is there then. Its cause is the OSError.
        """
        assert rows and key not in self
        line = encode_line(msgspec.json.encode(Call.of(key, rows)).decode())
        if not self.path.exists():
            write_atomically(self.path, b"")  # as private as its directory
        try:
            _write(self.path, self.size, line)
        except OSError as error:
            raise JobError(
                f"{self.path}: {error.strerror}; nothing was appended. Free space, then try again."
            ) from error
        self.size, self.count = self.size + len(line), self.count + len(rows)
        self._keys.add(key)

    def delete(self, key: str) -> bool:
        """Remove the rows of a call from the file; returns whether they were there. Their number and crc stay.

        Raises:
            JobError: the disk refuses; nothing is changed then.
        """
        if key not in self:
            return False
        data, start = bytearray(self.path.read_bytes()[: self.size]), 0
        for call, end in read_calls(self.path, 0, self.size):
            if call.key == key and not call.deleted:
                blank = msgspec.json.encode(Call(call.key, call.count, call.crc, [])).decode()
                # As long as it was: the engine reads on from where it has read to.
                data[start:end] = encode_line(blank.ljust(end - start - len(encode_line(""))))
                write_atomically(self.path, bytes(data))
                return True
            start = end
        return False


def _write(path: Path, offset: int, data: bytes) -> None:
    """Write `data` at `offset`, behind which the file ends, and wait for the disk. Raises OSError: as it was before."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, offset)  # what a killed process has left
        try:
            left = memoryview(data)
            at = offset
            while left:  # a full disk may take a part before it refuses the rest
                written = os.pwrite(descriptor, left, at)
                left, at = left[written:], at + written
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, offset)
            raise
    finally:
        os.close(descriptor)
