"""Records that survive, lists that can be paged, one owner of a state directory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from tests.openai_app import app_client
from vllm_zo import ConfigError
from vllm_zo.entrypoints.openai.errors import APIError
from vllm_zo.entrypoints.openai.state_dir import StateDir
from vllm_zo.entrypoints.openai.store import Store

MANY = 10_000


def job_record(number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"ftjob-{number:05d}", "object": "fine_tuning.job", "created_at": number, "model": "base",
        "organization_id": "vllm-zo", "status": "succeeded", "hyperparameters": {}, "method": {"type": "supervised"},
        "training_file": "file-1", "seed": number, "metadata": {"parity": "odd" if number % 2 else "even"}, **more,
    }  # fmt: skip


def test_ten_thousand_jobs_are_listed_page_by_page(tmp_path: Path) -> None:
    with app_client(tmp_path) as client:
        store: Store = client.app.state.zo.store  # type: ignore[attr-defined]
        with store.transaction():
            for number in range(MANY):
                store.add("jobs", job_record(number))
        seen: list[str] = []
        page: dict[str, Any] = {"has_more": True}
        slowest = 0.0
        while page["has_more"]:
            after = {"after": seen[-1]} if seen else {}
            start = time.perf_counter()
            page = client.get("/v1/fine_tuning/jobs", params={"limit": 1000, **after}).json()
            slowest = max(slowest, time.perf_counter() - start)
            seen += [job["id"] for job in page["data"]]
        assert seen == [f"ftjob-{number:05d}" for number in reversed(range(MANY))]
        assert slowest < 5.0, "a page must not cost more the further back it is"
        first = client.get("/v1/fine_tuning/jobs").json()
        assert len(first["data"]) == 20 and first["has_more"] and first["last_id"] == "ftjob-09980"
        odd = client.get("/v1/fine_tuning/jobs", params={"metadata[parity]": "odd", "limit": 3}).json()
        assert [job["seed"] for job in odd["data"]] == [9999, 9997, 9995] and odd["has_more"]


def test_paging_is_not_disturbed_by_what_is_added_meanwhile(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    for number in range(5):
        store.add("jobs", job_record(number))
    first = store.page("jobs", limit=2)
    store.add("jobs", job_record(5))
    rest = store.page("jobs", after=first.data[-1]["id"], limit=10)
    assert [job["seed"] for job in first.data + rest.data] == [4, 3, 2, 1, 0]


def test_an_unknown_cursor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(APIError, match="after='ftjob-x': no such record"):
        Store(tmp_path / "db").page("jobs", after="ftjob-x", limit=2)


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    with pytest.raises(sqlite3.IntegrityError), store.transaction():
        store.add("jobs", job_record(1))
        store.add("jobs", job_record(1))
    assert store.all("jobs") == []


def write_for_ever(path: str) -> None:
    store = Store(Path(path))
    for number in range(1_000_000):
        with store.transaction():
            store.add("jobs", job_record(number))
            store.add("events", {"id": f"ftevent-{number}"}, parent=f"ftjob-{number:05d}")


@pytest.mark.parametrize("after_s", [0.05, 0.11, 0.23])
def test_killed_at_any_moment_a_transaction_is_there_whole_or_not_at_all(tmp_path: Path, after_s: float) -> None:
    path = tmp_path / "db"
    process = multiprocessing.get_context("spawn").Process(target=write_for_ever, args=(str(path),))
    process.start()
    log = tmp_path / "db-wal"
    while not log.exists() or log.stat().st_size < 100_000:  # the tables alone are less
        time.sleep(0.01)
    time.sleep(after_s)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store = Store(path)
    jobs, events = store.all("jobs"), store.all("events")
    assert jobs and [job["seed"] for job in jobs] == list(range(len(jobs)))
    assert [event["id"] for event in events] == [f"ftevent-{number}" for number in range(len(jobs))]


def test_a_newer_format_is_not_touched(tmp_path: Path) -> None:
    Store(tmp_path / "db").close()
    connection = sqlite3.connect(tmp_path / "db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="written by a newer version"):
        Store(tmp_path / "db")


def test_a_state_directory_has_one_owner(tmp_path: Path) -> None:
    owner = StateDir(tmp_path).acquire()
    with pytest.raises(ConfigError, match=f"another server owns it .process {os.getpid()}."):
        StateDir(tmp_path).acquire()
    owner.release()
    StateDir(tmp_path).acquire().release()


def test_a_state_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be used"):
        StateDir(tmp_path / "file").acquire()
