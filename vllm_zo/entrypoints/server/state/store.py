"""Records of the server in SQLite (WAL): files, jobs, events, checkpoints, models.

A table keeps the JSON object that clients see, and beside it the few columns by which the server looks records up. A
job's object also has fields for the server alone (job_record.py). Every method is one transaction: a server that is
killed at any moment has written all of it or nothing. Any thread may call every method. All of them may raise
sqlite3.OperationalError, e.g. for a full disk.

For a request of a project (keys/current.py) there are only that project's records here: another's is missing.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.keys.current import OPERATOR, current_project
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.status import JobStatus

Record = dict[str, Any]

VERSION = 3
SCHEMA = """
CREATE TABLE {table} (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    parent TEXT,
    status TEXT,
    body TEXT NOT NULL
);
CREATE INDEX {table}_parent ON {table} (parent, seq);
CREATE INDEX {table}_status ON {table} (status, seq);
"""
TABLES = {1: ("files", "jobs", "events", "checkpoints", "models"), 2: ("answers", "feedback")}
"""Format -> the tables that it has more. `parent` is the job of a record, and the purpose of a file. SQLite takes no
parameter for the name of a table, so queries are formatted with these names, never with text of a client."""
PROJECTS = """
ALTER TABLE files ADD COLUMN owner TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN owner TEXT NOT NULL DEFAULT '';
CREATE INDEX files_owner ON files (owner, seq);
CREATE INDEX jobs_owner ON jobs (owner, seq);
CREATE TABLE usage (owner TEXT NOT NULL, day INTEGER NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (owner, day));
"""
"""What format 3 adds: whose a file or a job is (everything of before is the operator's), and the tokens that the jobs
of a project have trained on, day by day."""
OWNED = ("files", "jobs")
"""Tables with a column `owner`. A record of the others belongs to the job that is its `parent`."""


@dataclass(frozen=True)
class Page:
    """Part of a list, and whether there is more of it."""

    data: list[Record]
    has_more: bool


class Store:
    """One connection behind a lock. One is enough: there is one write for each poll of a job, and reads are short.

    The lock is re-entrant, so a transaction may call methods that are transactions themselves.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        # Threads of a pool use it, one at a time because of the lock. isolation_level=None: Python's module would
        # otherwise begin transactions by itself.
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        # With WAL, NORMAL may lose the last commits in a power cut, and clients have seen them.
        self._connection.execute("PRAGMA synchronous = FULL")
        found = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if found > VERSION:
            raise ConfigError(f"{path}: written by a newer version of vllm-zo (format {found}); upgrade this one.")
        if found < VERSION:
            with self.transaction():
                new = [table for version, tables in TABLES.items() if version > found for table in tables]
                self._run("".join(SCHEMA.format(table=table) for table in new))
                self._run(PROJECTS)
                self._connection.execute(f"PRAGMA user_version = {VERSION}")

    def _run(self, script: str) -> None:
        # One by one: `executescript` would commit the transaction first.
        for statement in script.split(";")[:-1]:
            self._connection.execute(statement)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write everything in the block, or nothing. Blocks may be nested: the outermost one commits."""
        with self._lock:
            is_nested = self._connection.in_transaction
            if is_nested:
                yield
                return
            # IMMEDIATE takes the write lock before the first read. A block that reads and then writes could otherwise
            # fail in the middle, if another program (an operator's sqlite3) wrote in between.
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # Anything that ends the block: a transaction left open would take in the next ones. After a COMMIT
                # that found the disk full it may be open or rolled back; a second ROLLBACK would hide that error.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def add_job(self, job: JobRecord, *events: Record) -> None:
        with self.transaction():
            self.add("jobs", job.to_json(), owner=job.owner)
            self.add_all("events", events, parent=job.id)

    def job(self, job_id: str) -> JobRecord:
        """The job as it is now.

        Raises:
            APIError: 404, there is no such job.
        """
        whose, values = _of_project("jobs")
        with self._lock:
            row = self._connection.execute(
                f"SELECT body FROM jobs WHERE id = ? AND {whose}", (job_id, *values)
            ).fetchone()
        if row is None:
            raise APIError(404, f"No such job: {job_id!r}.", "fine_tuning_job_id", "job_not_found")
        return JobRecord.from_text(row[0])

    def jobs(self, statuses: Iterable[JobStatus]) -> list[JobRecord]:
        """Every job in one of the statuses, oldest first."""
        wanted = list(statuses)
        marks = ",".join("?" * len(wanted))
        whose, values = _of_project("jobs")
        with self._lock:
            rows = self._connection.execute(
                f"SELECT body FROM jobs WHERE status IN ({marks}) AND {whose} ORDER BY seq", (*wanted, *values)
            )
            return [JobRecord.from_text(body) for (body,) in rows]

    def change_job(self, job_id: str, *events: Record, **changes: Any) -> JobRecord:
        """Write events of a job and change fields of its record, both or neither; returns the new record.

        Raises:
            APIError: 404, there is no such job.
        """
        assert "status" not in changes, "a status is changed by move_job, which looks at the one before"
        with self.transaction():
            return self._write_job(self.job(job_id), events, changes)

    def move_job(
        self, job_id: str, before: Collection[JobStatus], status: JobStatus, *events: Record, **changes: Any
    ) -> JobRecord | None:
        """`change_job` with a new status, if the job's status is one of those in `before`.

        Returns:
            The new record; None if the job has another status: nothing is changed then.

        Raises:
            APIError: 404, there is no such job.

        Transitions of a job happen one after another here, whether two clients, an answer of the engine (which may be a
        moment old) or a restart ask for them. Of two that exclude each other, the second finds another status.
        """
        with self.transaction():
            job = self.job(job_id)
            return self._write_job(job, events, {**changes, "status": status}) if job.status in before else None

    def _write_job(self, job: JobRecord, events: Iterable[Record], changes: Record) -> JobRecord:
        job = msgspec.structs.replace(job, **changes)
        self.add_all("events", events, parent=job.id)
        self._connection.execute(
            "UPDATE jobs SET body = ?, status = ? WHERE id = ?", (json.dumps(job.to_json()), job.status, job.id)
        )
        return job

    # --- any table ----------------------------------------------------------------------------------------------------

    def add(
        self,
        table: str,
        record: Record,
        parent: str | None = None,
        status: str | None = None,
        owner: str | None = None,
    ) -> None:
        """Write a new record under `record["id"]`.

        Args:
            owner: the project of a file or a job.
        """
        row = {"id": record["id"], "parent": parent, "status": status or record.get("status")}
        row |= {"body": json.dumps(record)} | ({"owner": owner or OPERATOR} if table in OWNED else {})
        with self.transaction():
            self._connection.execute(
                f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", tuple(row.values())
            )

    def add_all(self, table: str, records: Iterable[Record], parent: str) -> None:
        with self.transaction():
            for record in records:
                self.add(table, record, parent)

    def find(self, table: str, key: str) -> Record | None:
        whose, values = _of_project(table)
        with self._lock:
            row = self._connection.execute(
                f"SELECT body FROM {table} WHERE id = ? AND {whose}", (key, *values)
            ).fetchone()
        return None if row is None else json.loads(row[0])

    def update(self, table: str, key: str, **changes: Any) -> Record:
        """Change fields of a record; returns it as it is now.

        Raises:
            APIError: 404, there is no such record (any more).
        """
        with self.transaction():
            record = self.find(table, key)
            if record is None:
                raise APIError(404, f"No such record: {key!r}.", param="id")
            record |= changes
            self._connection.execute(
                f"UPDATE {table} SET body = ?, status = ? WHERE id = ?", (json.dumps(record), record.get("status"), key)
            )
            return record

    def delete(self, table: str, key: str) -> bool:
        whose, values = _of_project(table)
        with self.transaction():
            gone = self._connection.execute(f"DELETE FROM {table} WHERE id = ? AND {whose}", (key, *values))
            return gone.rowcount > 0

    def delete_before(self, table: str, parent: str, created_at: int) -> list[str]:
        """Delete records of a parent that are older than a time (Unix seconds); returns their ids."""
        where = "parent = ? AND json_extract(body, '$.created_at') < ?"
        with self.transaction():
            rows = self._connection.execute(f"SELECT id FROM {table} WHERE {where}", (parent, created_at)).fetchall()
            self._connection.execute(f"DELETE FROM {table} WHERE {where}", (parent, created_at))
        return [key for (key,) in rows]

    def trim(self, table: str, parent: str, keep: int) -> None:
        """Delete all but the newest `keep` records of a parent."""
        last = f"SELECT seq FROM {table} WHERE parent = ? ORDER BY seq DESC LIMIT 1 OFFSET ?"
        with self.transaction():
            self._connection.execute(
                f"DELETE FROM {table} WHERE parent = ? AND seq <= ({last})", (parent, parent, keep)
            )

    def page(
        self,
        table: str,
        *,
        after: str | None = None,
        limit: int,
        parent: str | None = None,
        metadata: Mapping[str, str] | None = None,
        oldest_first: bool = False,
    ) -> Page:
        """Records in the order in which they were made, starting behind the record `after`.

        Args:
            metadata: only records whose metadata has these keys and values.

        Raises:
            APIError: 400, there is no record `after`.
        """
        where, values = _conditions(table)
        if parent is not None:
            where.append("parent = ?")
            values.append(parent)
        for key, value in (metadata or {}).items():
            # json_each and not a path such as $.metadata.key: a client's key may have any characters in it.
            where.append("EXISTS (SELECT 1 FROM json_each(body, '$.metadata') AS m WHERE m.key = ? AND m.value = ?)")
            values += [key, value]
        with self._lock:
            if after is not None:
                where.append(f"seq {'>' if oldest_first else '<'} ?")
                values.append(str(self._sequence_of(table, after)))
            condition = f"WHERE {' AND '.join(where)}" if where else ""
            order = "ASC" if oldest_first else "DESC"
            rows = self._connection.execute(  # one more than the page has: it tells whether there are more
                f"SELECT body FROM {table} {condition} ORDER BY seq {order} LIMIT ?", (*values, limit + 1)
            ).fetchall()
        return Page([json.loads(body) for (body,) in rows[:limit]], len(rows) > limit)

    def _sequence_of(self, table: str, key: str) -> int:
        whose, values = _of_project(table)
        row = self._connection.execute(f"SELECT seq FROM {table} WHERE id = ? AND {whose}", (key, *values)).fetchone()
        if row is None:
            raise APIError(
                400, f"after={key!r}: no such record; give the id of the last one of the page before.", "after"
            )
        return int(row[0])

    def all(self, table: str, *, parent: str | None = None, statuses: Iterable[str] | None = None) -> list[Record]:
        """Every record of the parent and in one of the statuses, as far as they are given, oldest first."""
        where, values = _conditions(table)
        if parent is not None:
            where.append("parent = ?")
            values.append(parent)
        if statuses is not None:
            wanted = list(statuses)
            where.append(f"status IN ({','.join('?' * len(wanted))})")
            values += wanted
        condition = f"WHERE {' AND '.join(where)}" if where else ""
        with self._lock:
            rows = self._connection.execute(f"SELECT body FROM {table} {condition} ORDER BY seq", values).fetchall()
        return [json.loads(body) for (body,) in rows]

    def means(self, table: str, number: str, by: str, parent: str) -> dict[str, tuple[int, float]]:
        """Value of the field `by` -> how many records of the parent have the field `number`, and its mean."""
        field, group = f"json_extract(body, '$.{number}')", f"json_extract(body, '$.{by}')"
        where, values = _conditions(table)
        condition = " AND ".join([*where, "parent = ?", f"{field} IS NOT NULL"])
        query = f"SELECT {group}, COUNT(*), AVG({field}) FROM {table} WHERE {condition} GROUP BY {group}"
        with self._lock:
            rows = self._connection.execute(query, (*values, parent)).fetchall()
        return {name: (count, mean) for name, count, mean in rows}

    def parents(self, table: str) -> set[str]:
        """The parents that records of the table have."""
        where, values = _conditions(table)
        condition = f"WHERE {' AND '.join([*where, 'parent IS NOT NULL'])}"
        with self._lock:
            rows = self._connection.execute(f"SELECT DISTINCT parent FROM {table} {condition}", values).fetchall()
        return {parent for (parent,) in rows}

    # --- what projects use --------------------------------------------------------------------------------------------

    def bytes_of_files(self) -> int:
        """Bytes of all files (of the current project)."""
        whose, values = _of_project("files")
        with self._lock:
            row = self._connection.execute(
                f"SELECT COALESCE(SUM(json_extract(body, '$.bytes')), 0) FROM files WHERE {whose}", values
            ).fetchone()
        return int(row[0])

    def add_tokens(self, owner: str, day: int, tokens: int) -> None:
        """Count tokens that a job of this project has trained on."""
        with self.transaction():
            self._connection.execute(
                "INSERT INTO usage VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET tokens = tokens + excluded.tokens",
                (owner, day, tokens),
            )

    def tokens_of(self, owner: str, day: int) -> int:
        with self._lock:
            row = self._connection.execute(
                "SELECT tokens FROM usage WHERE owner = ? AND day = ?", (owner, day)
            ).fetchone()
        return 0 if row is None else int(row[0])


def _of_project(table: str) -> tuple[str, list[str]]:
    """A condition for the records that the current project may see, and its values."""
    if (project := current_project()) is None:
        return "TRUE", []
    if table in OWNED:
        return "owner = ?", [project]
    return "parent IN (SELECT id FROM jobs WHERE owner = ?)", [project]


def _conditions(table: str) -> tuple[list[str], list[str]]:
    whose, values = _of_project(table)
    return ([whose], values) if values else ([], [])
