"""Uploads: what is accepted, what is refused and how, and that nothing is left behind by what is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.openai_app import app_client, upload
from vllm_zo.entrypoints.server.state.files import safe_name

ROWS = b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with app_client(tmp_path / "state", upload_limit_mb=1) as client:
        yield client


def contents(client: TestClient) -> list[str]:
    return sorted(path.name for path in client.app.state.zo.state.file("").iterdir())  # type: ignore[attr-defined]


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_file_comes_back_byte_for_byte_until_it_is_deleted(client: TestClient) -> None:
    file = upload(client, ROWS).json()
    assert (file["bytes"], file["filename"], file["status"]) == (len(ROWS), "train.jsonl", "processed")
    url = f"/v1/files/{file['id']}"
    assert client.get(url).json() == file and client.get(f"{url}/content").content == ROWS
    assert client.delete(url).json() == {"id": file["id"], "object": "file", "deleted": True}
    assert error_of(client.get(f"{url}/content"), 404)["code"] == "file_not_found"
    assert contents(client) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "there are no records in it"),
        (b"\n \n", "there are no records in it"),
        (ROWS + b'{"prompt": "e", "compl', "line 3: not valid JSON .*; the file ends in the middle of this record"),
        (ROWS + b"not json\n", "line 3: not valid JSON"),
        (b"[1, 2]\n", "line 1: expected a JSON object, found list"),
        (ROWS + '{"prompt": "é"}\n'.encode("latin-1"), "line 3: not UTF-8 .byte 0xe9."),
        (json.dumps({"a": 1}).encode("utf-16"), "line 1: not UTF-8"),
        (b"\x00\x01\x02PK\x03\x04", "line 1: not valid JSON"),
        (ROWS + b'{"prompt": "day \\ud83d"}\n', "line 3, field 'prompt': half a character .*position 4"),
        (b"[" * 100_000, "line 1: not valid JSON"),
    ],
)
def test_a_corrupt_upload_names_its_line_and_leaves_nothing(client: TestClient, data: bytes, message: str) -> None:
    error = error_of(upload(client, data), 400)
    assert error["param"] == "file"
    assert re.search(message, error["message"]), error["message"]
    assert contents(client) == [] and client.get("/v1/files").json()["data"] == []


def test_a_byte_order_mark_is_no_fault(client: TestClient) -> None:
    file = upload(client, b"\xef\xbb\xbf" + ROWS).json()
    assert client.app.state.zo.files.records(file["id"], "training_file")[0]["prompt"] == "a"  # type: ignore[attr-defined]


def test_another_purpose_is_refused(client: TestClient) -> None:
    assert error_of(upload(client, ROWS, purpose="assistants"), 400)["param"] == "purpose"


def test_an_upload_above_the_limit_is_refused_before_it_is_read(client: TestClient) -> None:
    big = b'{"prompt": "a"}\n' * (1 << 17)
    assert error_of(upload(client, big), 413)["code"] == "too_large"
    # Ten gigabytes by the header alone: the body is never sent, and must not be waited for.
    headers = {"content-length": str(10 << 30), "content-type": "multipart/form-data; boundary=x"}
    assert error_of(client.post("/v1/files", content=b"--x", headers=headers), 413)["code"] == "too_large"
    assert contents(client) == []


def test_an_upload_above_the_limit_without_a_length_is_cut_off(client: TestClient) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while sent < 64 << 20:
            sent += 1 << 16
            yield b"x" * (1 << 16)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert error_of(client.post("/v1/files", content=endless(), headers=headers), 413)["code"] == "too_large"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("..", "upload.jsonl"),
        ("C:\\Users\\me\\train.jsonl", "train.jsonl"),
        ("/absolute/../train.jsonl", "train.jsonl"),
        ("a\x00\n\x1b[31m.jsonl", "a[31m.jsonl"),
        ("", "upload.jsonl"),
        ("日本.jsonl", "日本.jsonl"),
    ],
)
def test_a_file_name_is_shown_and_never_used_as_a_path(tmp_path: Path, given: str, kept: str) -> None:
    assert safe_name(given) == kept


def test_a_traversing_upload_stays_inside_the_state_directory(client: TestClient, tmp_path: Path) -> None:
    file = upload(client, ROWS, name="../../../outside.jsonl").json()
    assert file["filename"] == "outside.jsonl" and contents(client) == [file["id"]]
    assert not list(tmp_path.glob("**/outside.jsonl"))


@pytest.mark.parametrize("name", ["..", "../server.db", "%2e%2e%2fserver.db", "file-none"])
def test_an_id_that_is_no_file_is_a_404(client: TestClient, name: str) -> None:
    for suffix in ("", "/content"):
        assert client.get(f"/v1/files/{name}{suffix}").status_code == 404


@pytest.mark.parametrize("name", ["none", "org/none", "a%0Ab", "%0A"])
def test_a_name_that_is_no_model_is_a_404(client: TestClient, name: str) -> None:
    for answer in (client.get(f"/v1/models/{name}"), client.delete(f"/v1/models/{name}")):
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_a_full_disk_is_a_507_and_leaves_nothing(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "disk is full" in error_of(upload(client, ROWS), 507)["message"]
    assert contents(client) == [] and client.get("/v1/files").json()["data"] == []
    assert upload(client, ROWS).status_code == 200


def test_a_full_temporary_directory_is_a_507(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    long = b'{"prompt": "a"}\n' * (1 << 17)  # Starlette keeps a short upload in memory
    with app_client(tmp_path) as client, monkeypatch.context() as patch:
        patch.setattr(tempfile.SpooledTemporaryFile, "rollover", full)
        assert "disk is full" in error_of(upload(client, long), 507)["message"]


def test_a_download_is_whole_and_leaves_no_file(client: TestClient, tmp_path: Path) -> None:
    zo: Any = client.app.state.zo  # type: ignore[attr-defined]
    model = {"id": "ft:base:x", "job_id": "ftjob-1", "step": 3, "kind": "checkpoint", "status": "unloaded"}
    zo.store.add("models", model, parent="ftjob-1")
    directory = zo.names.directory(model)
    directory.mkdir(parents=True)
    (directory / "adapter_model.safetensors").write_bytes(os.urandom(1 << 20))
    before = sorted(tmp_path.rglob("*"))
    answer = client.get("/v1/fine_tuning/checkpoints/ft:base:x/content")
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["content-disposition"] == 'attachment; filename="ft-base-x.tar"'
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        file = archive.extractfile("step-3/adapter_model.safetensors")
        assert file is not None and file.read() == (directory / "adapter_model.safetensors").read_bytes()
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_killed_server_was_writing_is_swept_away(tmp_path: Path) -> None:
    with app_client(tmp_path) as client:
        kept = upload(client, ROWS).json()["id"]
    (tmp_path / "files" / ".file-half.123.tmp").write_bytes(b"half")
    (tmp_path / "files" / "file-unrecorded").write_bytes(b"whole, but its record was never written")
    with app_client(tmp_path) as client:
        assert contents(client) == [kept]
