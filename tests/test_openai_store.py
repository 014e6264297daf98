"""Records that survive, lists that can be paged, one owner of a state directory."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.children import Child, add_whole
from tests.openai_app import app_client
from vllm_zo import ConfigError
from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.http.schemas import event
from vllm_zo.entrypoints.server.keys.limits import Quotas
from vllm_zo.entrypoints.server.live.feedback import Feedback
from vllm_zo.entrypoints.server.state.directory import StateDir
from vllm_zo.entrypoints.server.state.files import Files
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.entrypoints.server.state.store import Store
from vllm_zo.jobs.status import FINAL, UNFINISHED, JobStatus

MANY = 10_000


def job_record(number: int, **more: Any) -> JobRecord:
    fields: dict[str, Any] = {
        "id": f"ftjob-{number:05d}", "created_at": number, "model": "base", "organization_id": "vllm-zo",
        "status": JobStatus.SUCCEEDED, "hyperparameters": {}, "method": {"type": "supervised"}, "request": {},
        "training_file": "file-1", "seed": number, "metadata": {"parity": "odd" if number % 2 else "even"},
        "model_path": "base", "base": "f",
    }  # fmt: skip
    return JobRecord(**{**fields, **more})


def test_old_answers_are_forgotten_without_reading_every_job_there_ever_was(tmp_path: Path) -> None:
    store = Store(tmp_path / "server.db")
    method = {"continual": True, "feedback": {"retention_days": 1}}

    def add(number: int, **method: Any) -> str:
        request = {"model": "base", "training_file": "file-1", "metadata": {"note": "x" * 500}}
        job = job_record(number, request=request | {"method": {"type": "zeroth_order", "zeroth_order": method}})
        store.add_job(job)
        return job.id

    with store.transaction():
        learners = [add(0, **method), add(1, **method)]
        for number in range(2, 1000):
            add(number)
        for learner in learners:
            for name, created in (("old", 0), ("new", int(time.time()))):
                store.add("answers", {"id": f"{name}-{learner}", "created_at": created}, parent=learner)
    feedback = Feedback(store, None, None)  # type: ignore[arg-type]  # for what it does with rows and chats
    tracemalloc.start()
    feedback._sweep()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {answer["id"] for answer in store.all("answers")} == {f"new-{learner}" for learner in learners}
    assert peak < 300_000, "the records of a thousand jobs are more"


def test_means_are_of_one_parent_and_of_the_records_that_have_the_number(tmp_path: Path) -> None:
    store = Store(tmp_path / "server.db")
    rows = [("job-a", "v1", 0.5), ("job-a", "v1", None), ("job-a", "v1", 1.0), ("job-a", "v2", -1), ("job-b", "v1", 9)]
    for number, (job, model, score) in enumerate(rows):
        store.add("feedback", {"id": f"f-{number}", "model": model, "score": score}, parent=job)
    store.add("feedback", {"id": "f-none", "model": "v3", "score": None}, parent="job-a")
    assert store.means("feedback", "score", by="model", parent="job-a") == {"v1": (2, 0.75), "v2": (1, -1.0)}
    assert store.means("feedback", "score", by="model", parent="job-c") == {}


def test_ten_thousand_jobs_are_listed_page_by_page(tmp_path: Path) -> None:
    with app_client(tmp_path) as client:
        store: Store = client.app.state.zo.store  # type: ignore[attr-defined]
        with store.transaction():
            for number in range(MANY):
                store.add_job(job_record(number))
        seen: list[str] = []
        page: dict[str, Any] = {"has_more": True}
        slowest = 0.0
        while page["has_more"]:
            after = {"after": seen[-1]} if seen else {}
            start = time.process_time()  # the app is a thread of this process; other programs do not count
            page = client.get("/v1/fine_tuning/jobs", params={"limit": 1000, **after}).json()
            slowest = max(slowest, time.process_time() - start)
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
        store.add_job(job_record(number))
    first = store.page("jobs", limit=2)
    store.add_job(job_record(5))
    rest = store.page("jobs", after=first.data[-1]["id"], limit=10)
    assert [job["seed"] for job in first.data + rest.data] == [4, 3, 2, 1, 0]


def test_an_unknown_cursor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(APIError, match="after='ftjob-x': no such record"):
        Store(tmp_path / "db").page("jobs", after="ftjob-x", limit=2)


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    with pytest.raises(sqlite3.IntegrityError), store.transaction():
        store.add_job(job_record(1))
        store.add_job(job_record(1))
    assert store.all("jobs") == []


@pytest.mark.parametrize("sqlite_has_rolled_back", [False, True])
def test_a_commit_that_finds_no_room_leaves_nothing_open(tmp_path: Path, sqlite_has_rolled_back: bool) -> None:
    store = Store(tmp_path / "store.db")

    class Full:
        """A connection whose next COMMIT fails."""

        def __init__(self, inner: sqlite3.Connection) -> None:
            self.inner, self.fails = inner, True

        def execute(self, statement: str, *args: Any) -> Any:
            if statement == "COMMIT" and self.fails:
                self.fails = False
                if sqlite_has_rolled_back:
                    self.inner.execute("ROLLBACK")
                raise sqlite3.OperationalError("database or disk is full")
            return self.inner.execute(statement, *args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    store._connection = Full(store._connection)  # type: ignore[assignment]
    with pytest.raises(sqlite3.OperationalError, match="disk is full"):
        store.add_job(job_record(1))
    store.add_job(job_record(2))
    assert [job.id for job in store.jobs(JobStatus)] == ["ftjob-00002"]
    store.close()


def test_a_job_comes_back_as_it_was_and_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    job = job_record(1, evaluations=[{"step": 0, "eval_loss": None}], suffix="tone", cancelling=True, keep_base=True)
    store.add_job(job, event("Created"))
    store.close()
    store = Store(tmp_path / "db")
    assert store.job(job.id) == job and [e["message"] for e in store.all("events", parent=job.id)] == ["Created"]
    with pytest.raises(APIError, match="No such job"):
        store.job("ftjob-x")


def test_a_status_moves_only_from_those_it_may_and_tells_nothing_else(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    store.add_job(job_record(1, status=JobStatus.PAUSED))
    job_id = job_record(1).id
    moved = store.move_job(job_id, {JobStatus.PAUSED}, JobStatus.QUEUED, event("The job is queued again"), step=3)
    assert moved is not None and (moved.status, moved.step) == (JobStatus.QUEUED, 3) and moved == store.job(job_id)
    assert store.move_job(job_id, {JobStatus.PAUSED}, JobStatus.QUEUED, event("again"), step=9) is None
    assert store.job(job_id) == moved and len(store.all("events", parent=job_id)) == 1
    assert store.jobs(UNFINISHED) == [moved] and store.jobs(FINAL) == []


def whole(store: Store) -> int:
    """How many transactions of `add_whole` are there, each whole and once."""
    jobs, events = store.all("jobs"), store.all("events")
    assert [job["seed"] for job in jobs] == list(range(len(jobs)))
    assert [event["id"] for event in events] == [f"ftevent-{number}" for number in range(len(jobs))]
    return len(jobs)


BEFORE, COMMITS = 400, 10
LIMITS = range(0, 420_000, 15_013)
"""Sizes of files, in bytes, at which writes fail: anywhere in frames of the log (4120 bytes) and in pages (4096). The
log gets a few 100,000 bytes long, the database, which has `BEFORE` records, is longer."""


def test_within_any_write_of_sqlite_a_death_or_a_full_disk_loses_and_repeats_nothing(tmp_path: Path) -> None:
    before = Store(tmp_path / "db")
    with before.transaction():
        for number in range(BEFORE):
            before.add("answers", {"id": f"answer-{number}", "text": "x" * 1000})
    before.close()
    for how in ("dies", "refused"):
        for limit in LIMITS:
            (tmp_path / "stores" / how / str(limit)).mkdir(parents=True)
            shutil.copy(tmp_path / "db", tmp_path / "stores" / how / str(limit))
    reports = Child("write_until_the_disk_refuses", str(tmp_path / "stores"), str(COMMITS)).finish()
    assert len(reports) == 2 * len(LIMITS)
    for report in reports:
        store = Store(Path(report["directory"]) / "db")
        found = whole(store)
        # What was written and not yet acknowledged may be there: who asked does not know, and asks.
        assert found - report["acknowledged"] in ((0, 1) if report["died"] else (0,)), (found, report)
        add_whole(store, found)
        assert whole(store) == found + 1 and len(store.all("answers")) == BEFORE
        assert store._connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        store.close()
    died = {report["acknowledged"] for report in reports if report["died"]}
    assert len(died) > 3 and all(report["acknowledged"] == COMMITS for report in reports if not report["died"])


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


def test_a_state_directory_is_for_its_owner_alone_also_one_that_was_open(tmp_path: Path) -> None:
    root = tmp_path / "state"
    kept = root / "adapters" / "ftjob-1" / "step-3" / "adapter_model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"weights")
    (root / "server.db-wal").touch(mode=0o644)
    assert kept.stat().st_mode & 0o044, "the test's own umask makes open files, as an earlier version did"
    directory = StateDir(root).acquire()
    try:
        store = Store(directory.database)
        store.add_job(job_record(1))
        Files(directory, store, Quotas(None, store)).keep(BytesIO(b'{"prompt": "a"}\n'), "a.jsonl", "fine-tune")
        write_atomically(directory.job("ftjob-1") / "train.jsonl", b"{}\n")  # as the engine and the exports write
        modes = {path.relative_to(root): path.stat().st_mode & 0o777 for path in (root, *root.rglob("*"))}
        store.close()
    finally:
        directory.release()
    assert len(modes) >= 12 and {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


def test_half_files_of_a_killed_server_are_swept_away(tmp_path: Path) -> None:
    StateDir(tmp_path).acquire().release()
    job = tmp_path / "jobs" / "ftjob-1"
    job.mkdir()
    for path in (job / ".seeds.log.7.tmp", tmp_path / ".download-x.tar", job / "seeds.log"):
        path.write_bytes(b"half")
    StateDir(tmp_path).acquire().release()
    assert [path.name for path in job.iterdir()] == ["seeds.log"] and not list(tmp_path.glob(".download*"))


def test_a_file_outside_a_private_directory_is_as_open_as_ever(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    tmp_path.chmod(0o755)
    write_atomically(tmp_path / "new" / "file", b"")
    for made, usual in ((tmp_path / "new" / "file", tmp_path / "plain"), (tmp_path / "new", tmp_path)):
        assert made.stat().st_mode & 0o777 == usual.stat().st_mode & 0o777
