"""Uploaded files: checked line by line, then kept under an id of ours. The client's file name is only ever shown."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from vllm_zo.checkpoint.files import replacing
from vllm_zo.entrypoints.openai.errors import DISK_FULL, APIError
from vllm_zo.entrypoints.openai.state_dir import StateDir
from vllm_zo.entrypoints.openai.store import Store
from vllm_zo.entrypoints.openai.wire import new_id, now
from vllm_zo.errors import JobError

TRAINING, RESULTS = "fine-tune", "fine-tune-results"
MAX_NAME = 255


class Files:
    """Contents in the state directory, descriptions in the store. Methods block: call them in a thread."""

    def __init__(self, state: StateDir, store: Store) -> None:
        self._state, self._store = state, store

    def keep(self, source: BinaryIO, filename: str, purpose: str) -> dict[str, Any]:
        """Check and keep an upload; returns its file object.

        Raises:
            APIError: 400, the purpose or a line of it; 507, the disk is full. Nothing is kept then.
        """
        if purpose != TRAINING:
            raise APIError(400, f"purpose={purpose!r}: expected {TRAINING!r}.", "purpose")
        check_jsonl(source)
        source.seek(0)
        file_id = new_id("file-")
        path = self._state.file(file_id)
        self._write(path, source)
        return self._describe(file_id, filename, TRAINING)

    def keep_result(self, content: bytes, filename: str) -> dict[str, Any]:
        """A file that the server made."""
        file_id = new_id("file-")
        self._write(self._state.file(file_id), BytesIO(content))
        return self._describe(file_id, filename, RESULTS)

    def _write(self, path: Path, source: BinaryIO) -> None:
        try:
            with replacing(path) as temporary, temporary.open("wb") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
        except JobError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in DISK_FULL:
                raise cause from error
            raise

    def _describe(self, file_id: str, filename: str, purpose: str) -> dict[str, Any]:
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
        self._store.add("files", record, parent=purpose)
        return record

    def find(self, file_id: str, param: str = "file_id") -> dict[str, Any]:
        """The file object.

        Raises:
            APIError: 404.
        """
        if (record := self._store.find("files", file_id)) is None:
            raise APIError(404, f"No such file: {file_id!r}.", param, "file_not_found")
        return record

    def path(self, file_id: str) -> Path:
        return self._state.file(self.find(file_id)["id"])

    def records(self, file_id: str, param: str) -> list[dict[str, Any]]:
        """The rows of a training file.

        Raises:
            APIError: 404, it is gone.
        """
        self.find(file_id, param)
        try:
            with self._state.file(file_id).open("rb") as file:
                return [json.loads(line) for line in file if line.strip()]
        except FileNotFoundError:
            raise APIError(404, f"{param}={file_id!r}: its contents are gone.", param, "file_not_found") from None

    def delete(self, file_id: str) -> None:
        self.find(file_id)
        self._store.delete("files", file_id)
        self._state.file(file_id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove contents that no record names: what a killed server was writing."""
        known = {record["id"] for record in self._store.all("files")}
        for path in self._state.file("").iterdir():
            if path.name not in known:
                path.unlink()


def safe_name(filename: str) -> str:
    """The last part of a client's file name, without control characters; it is shown, and never opened."""
    name = PureWindowsPath(PurePosixPath(filename).name).name
    name = "".join(c for c in name if c.isprintable())[:MAX_NAME]
    return name if name.strip(". ") else "upload.jsonl"


def check_jsonl(source: BinaryIO) -> int:
    """Number of records; every line but empty ones is a JSON object in UTF-8.

    Raises:
        APIError: 400, naming the first line that is not.
    """
    count, number, line = 0, 0, b""
    for number, line in enumerate(source, start=1):
        if line.strip():
            _check_line(line, number)
            count += 1
    if count == 0:
        raise APIError(400, "file: there are no records in it; write one JSON object a line.", "file")
    return count


def _check_line(line: bytes, number: int) -> None:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise APIError(
            400,
            f"file, line {number}: not UTF-8 (byte 0x{line[error.start]:02x}); convert it, e.g. with iconv.",
            "file",
        ) from None
    except (ValueError, RecursionError) as error:
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        cut = "; the file ends in the middle of this record" if not line.endswith(b"\n") else ""
        raise APIError(400, f"file, line {number}: not valid JSON ({why}){cut}.", "file") from None
    if not isinstance(record, dict):
        raise APIError(400, f"file, line {number}: expected a JSON object, found {type(record).__name__}.", "file")
