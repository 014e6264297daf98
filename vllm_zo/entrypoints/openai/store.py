"""Records of the server in SQLite (WAL): files, jobs, events, checkpoints, models.

A record is the JSON object that clients see, beside the few columns that are looked up. Every method is one
transaction, so that a server killed at any moment leaves all of it or nothing; all may be called from any thread.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_zo.entrypoints.openai.errors import APIError
from vllm_zo.errors import ConfigError

Record = dict[str, Any]

VERSION = 1
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
TABLES = ("files", "jobs", "events", "checkpoints", "models")
"""`parent` is the job of an event, a checkpoint or a model, and the purpose of a file."""


@dataclass(frozen=True)
class Page:
    """Part of a list, and whether there is more of it."""

    data: list[Record]
    has_more: bool


class Store:
    """One connection behind a lock: writes are few (batched a poll), and reads are short."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        found = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if found > VERSION:
            raise ConfigError(f"{path}: written by a newer version of vllm-zo (format {found}); upgrade this one.")
        if found < VERSION:
            with self.transaction():
                for table in TABLES:
                    for statement in SCHEMA.format(table=table).split(";")[:-1]:
                        self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything in the block is written, or nothing; blocks may be nested."""
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    # --- any table ----------------------------------------------------------------------------------------------------

    def add(self, table: str, record: Record, parent: str | None = None, status: str | None = None) -> None:
        """Write a new record; its key is `record["id"]`."""
        with self.transaction():
            self._connection.execute(
                f"INSERT INTO {table} (id, parent, status, body) VALUES (?, ?, ?, ?)",
                (record["id"], parent, status or record.get("status"), json.dumps(record)),
            )

    def add_all(self, table: str, records: Iterable[Record], parent: str) -> None:
        with self.transaction():
            for record in records:
                self.add(table, record, parent)

    def find(self, table: str, key: str) -> Record | None:
        with self._lock:
            row = self._connection.execute(f"SELECT body FROM {table} WHERE id = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def update(self, table: str, key: str, **changes: Any) -> Record:
        """Change fields of a record; returns it as it is now.

        Raises:
            APIError: 404, it is not there (any more).
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
        with self.transaction():
            return self._connection.execute(f"DELETE FROM {table} WHERE id = ?", (key,)).rowcount > 0

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
        """Records in the order they were made, from behind the record `after`.

        Raises:
            APIError: 400, there is no record `after` to go on from.
        """
        where, values = [], []
        if parent is not None:
            where.append("parent = ?")
            values.append(parent)
        for key, value in (metadata or {}).items():
            where.append("EXISTS (SELECT 1 FROM json_each(body, '$.metadata') AS m WHERE m.key = ? AND m.value = ?)")
            values += [key, value]
        with self._lock:
            if after is not None:
                where.append(f"seq {'>' if oldest_first else '<'} ?")
                values.append(str(self._sequence_of(table, after)))
            condition = f"WHERE {' AND '.join(where)}" if where else ""
            order = "ASC" if oldest_first else "DESC"
            rows = self._connection.execute(
                f"SELECT body FROM {table} {condition} ORDER BY seq {order} LIMIT ?", (*values, limit + 1)
            ).fetchall()
        return Page([json.loads(body) for (body,) in rows[:limit]], len(rows) > limit)

    def _sequence_of(self, table: str, key: str) -> int:
        row = self._connection.execute(f"SELECT seq FROM {table} WHERE id = ?", (key,)).fetchone()
        if row is None:
            raise APIError(
                400, f"after={key!r}: no such record; give the id of the last one of the page before.", "after"
            )
        return int(row[0])

    def all(self, table: str, *, parent: str | None = None, statuses: Iterable[str] | None = None) -> list[Record]:
        """Every record, oldest first."""
        where, values = [], []
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
