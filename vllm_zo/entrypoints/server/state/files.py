"""Uploaded files. The server checks them line by line and keeps them under an id of its own; it never opens a path of a
client's choice."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from vllm_zo.checkpoint.files import replacing
from vllm_zo.data.load import read_jsonl
from vllm_zo.entrypoints.server.http.errors import DISK_FULL, APIError
from vllm_zo.entrypoints.server.http.schemas import new_id, now
from vllm_zo.entrypoints.server.keys.current import current_project
from vllm_zo.entrypoints.server.keys.limits import Quotas
from vllm_zo.entrypoints.server.state.directory import StateDir
from vllm_zo.entrypoints.server.state.store import Store
from vllm_zo.errors import ConfigError, JobError

TRAINING, RESULTS = "fine-tune", "fine-tune-results"
MAX_NAME = 255
MAX_LINE_BYTES = 2 << 20
"""Longest line. Parsing one holds the interpreter lock, which stops the event loop: at most 0.05 s for this length."""
MAX_RECORDS = 1_000_000
"""Most records in a file. While the server prepares a job, its records are Python objects in memory."""


class Files:
    """Contents in the state directory, descriptions in the store. Methods block: call them in a thread."""

    def __init__(self, state: StateDir, store: Store, quotas: Quotas) -> None:
        self._state, self._store, self._quotas = state, store, quotas

    def keep(self, source: BinaryIO, filename: str, purpose: str) -> dict[str, Any]:
        """Check and keep an upload; returns its file object.

        Raises:
            APIError: 400, the purpose or a line cannot be used; 429, the project may keep no more. Nothing is kept
                then.
            OSError: the disk is full; the route answers 507. Nothing is kept then.
            JobError: the disk refuses for another reason.
        """
        if purpose != TRAINING:
            raise APIError(400, f"purpose={purpose!r}: expected {TRAINING!r}.", "purpose")
        check_jsonl(source)
        source.seek(0)
        file_id = new_id("file-")
        path = self._state.file(file_id)
        # Contents before the record: a file that a client sees is whole. After a crash `sweep` removes the contents.
        self._write(path, source)
        try:
            with self._store.transaction():
                self._quotas.take_bytes(path.stat().st_size)
                return self._describe(file_id, filename, TRAINING, current_project())
        except APIError:
            path.unlink()
            raise

    def keep_result(self, content: bytes, filename: str, owner: str) -> dict[str, Any]:
        """Keep a file that the server made; returns its file object. Raises OSError and JobError like `keep`.

        Args:
            owner: the project of the job that it is a result of.
        """
        file_id = new_id("file-")
        self._write(self._state.file(file_id), BytesIO(content))
        return self._describe(file_id, filename, RESULTS, owner)

    def _write(self, path: Path, source: BinaryIO) -> None:
        try:
            with replacing(path) as temporary, temporary.open("wb") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
        except JobError as error:
            # `replacing` wraps every OSError; a full disk must reach `disk_error`, which answers 507 or tries again.
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in DISK_FULL:
                raise cause from error
            raise

    def _describe(self, file_id: str, filename: str, purpose: str, owner: str | None) -> dict[str, Any]:
        size = self._state.file(file_id).stat().st_size
        record = {
            "id": file_id,
            "object": "file",
            "bytes": size,
            "created_at": now(),
            "filename": safe_name(filename),
            "purpose": purpose,
            "status": "processed",
            "expires_at": None,
            "status_details": None,
        }
        self._store.add("files", record, parent=purpose, owner=owner)
        return record

    def find(self, file_id: str, param: str = "file_id") -> dict[str, Any]:
        """The file object.

        Raises:
            APIError: 404, there is no such file.
        """
        if (record := self._store.find("files", file_id)) is None:
            raise APIError(404, f"No such file: {file_id!r}.", param, "file_not_found")
        return record

    def path(self, file_id: str) -> Path:
        return self._state.file(self.find(file_id)["id"])

    def records(self, file_id: str, param: str) -> list[dict[str, Any]]:
        """The rows of a training file.

        Args:
            param: the field of the request that names the file, for messages.

        Raises:
            APIError: 404, the file is gone.
            ConfigError: a row cannot be read.
        """
        self.find(file_id, param)
        try:
            with self._state.file(file_id).open("rb") as file:
                return list(read_jsonl(file, param))
        except FileNotFoundError:
            raise APIError(404, f"{param}={file_id!r}: its contents are gone.", param, "file_not_found") from None

    def delete(self, file_id: str) -> None:
        self.find(file_id)
        # The record first, for the same reason as in `keep`.
        self._store.delete("files", file_id)
        self._state.file(file_id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove contents that no record names: a killed server was writing or deleting them."""
        known = {record["id"] for record in self._store.all("files")}
        for path in self._state.file("").iterdir():
            if path.name not in known:
                path.unlink()


def safe_name(filename: str) -> str:
    """The last part of a client's file name, without control characters. The server shows it and never opens it."""
    # Both kinds of path: the client's system may be another than the server's.
    name = PureWindowsPath(PurePosixPath(filename).name).name
    name = "".join(c for c in name if c.isprintable())[:MAX_NAME]
    return name if name.strip(". ") else "upload.jsonl"


def check_jsonl(source: BinaryIO, name: str = "file") -> int:
    """Check that every line, empty ones excepted, is a JSON object in UTF-8; returns the number of records.

    Args:
        name: of the lines, in messages.

    Raises:
        APIError: 400, a line is not (the message names the first), or there are no records or too many.
    """
    try:
        count = sum(1 for _ in read_jsonl(_lines(source, name), name))
    except ConfigError as error:
        raise APIError(400, str(error), name) from None
    if count > MAX_RECORDS:
        raise APIError(400, f"{name}: {count} records; a job takes at most {MAX_RECORDS}.", name)
    if count == 0:
        raise APIError(400, f"{name}: there are no records in it; write one JSON object a line.", name)
    return count


def _lines(source: BinaryIO, name: str) -> Iterator[bytes]:
    """The lines of an upload, none longer than MAX_LINE_BYTES.

    Raises:
        APIError: 400, a line is longer; the message names it.
    """
    number = 0
    # Not `for line in source`: that would take a file without line feeds into memory as one line.
    while line := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise APIError(400, f"{name}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB.", name)
        yield line
