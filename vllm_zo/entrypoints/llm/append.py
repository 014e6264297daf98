"""Appends rows to a continual job: they go the road of its training data, and are on disk before the engine knows."""

from __future__ import annotations

import threading
import uuid
from typing import Any

from vllm_zo.entrypoints.llm.chats import Render
from vllm_zo.entrypoints.llm.prepare import encode_more
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.appended import AppendedRows
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives import Objective


class Appender:
    """The one writer of a job's appended rows. Any thread may call it.

    Args:
        engine: vLLM's `LLMEngine` or `AsyncLLM`.
        render: renders the chats of the rows, as it did those of the training data.

    Raises:
        ConfigError: the job's rows cannot grow.
        JobError: what was appended before cannot be read.
    """

    def __init__(self, engine: Any, directory: JobDir, render: Render | None) -> None:
        self._engine, self._render = engine, render
        self._description = directory.read_description()
        if not self._description.config.continual:
            raise ConfigError(f"job {directory.job_id}: its rows stay as they are; start it with continual=True.")
        self._rows = AppendedRows(directory.appended)
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """How far the engine may read the file, in bytes."""
        return self._rows.size

    @property
    def count(self) -> int:
        """All rows that were appended."""
        return self._rows.count

    @property
    def objective(self) -> Objective:
        """That of the job, as it reads the rows of its training data."""
        return self._description.config.objective

    def append(self, rows: Any, name: str = "rows", key: str | None = None, objective: Objective | None = None) -> int:
        """Check, tokenise and write rows; returns how many there are: an example each, or more of a chat.

        Args:
            rows: data in any form that `finetune` takes.
            name: of the data, in messages.
            key: names the call. One that was made before appends nothing, and returns 0.
            objective: reads the rows in place of the job's (`encode_more`).

        Raises:
            ConfigError: a row cannot be used; the message names it, and nothing is appended.
            JobError: the disk refuses; nothing is appended.
        """
        key = key or uuid.uuid4().hex
        if key in self._rows:
            return 0
        examples = encode_more(self._engine, rows, self._description, self._render, name, objective)
        with self._lock:
            if key in self._rows:  # another thread has sent the same
                return 0
            self._rows.append(key, examples)
        return len(examples)

    def delete(self, key: str) -> bool:
        """Remove the rows of a call; returns whether there were any. Raises JobError: the disk refuses."""
        with self._lock:
            return self._rows.delete(key)
