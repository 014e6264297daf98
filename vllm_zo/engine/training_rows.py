"""Where a training step gets its rows: `FixedRows` of a job that has all of them from the beginning, `GrowingRows` of a
continual job."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_zo.checkpoint.seed_log.format import RowsSoFar, StepRecord
from vllm_zo.config import JobConfig
from vllm_zo.data.batches import BatchOrder
from vllm_zo.data.buffer import Buffer
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.appended import read_calls
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives.base import EncodedExample


@dataclass(frozen=True)
class Drawn:
    """The rows of a step: their numbers, the examples, and `StepRecord.appended`."""

    ids: tuple[int, ...]
    examples: tuple[EncodedExample, ...]
    appended: RowsSoFar | None = None


class TrainingRows(Protocol):
    """What a job needs of its training data."""

    def read(self) -> None:
        """Read the files, when the job has its first lane. Raises OSError, ValueError, MsgspecError."""

    def draw(self, step: int) -> Drawn:
        """The rows of a step. Steps are asked for in their order; one that was dropped is asked for again."""

    def of(self, numbers: Sequence[int]) -> tuple[EncodedExample, ...]:
        """Rows that a step has drawn, by their numbers."""

    def __len__(self) -> int:
        """How many rows are in memory."""

    def forget(self) -> None:
        """Free the memory, when the job has ended."""


class FixedRows:
    """Rows that never change."""

    def __init__(self, directory: JobDir, config: JobConfig) -> None:
        self._directory, self._config = directory, config
        self.examples: Sequence[EncodedExample] = ()
        """All of them; `engine/references.py` puts what the base says of them into them."""
        self._order: BatchOrder | None = None

    def read(self) -> None:
        self.examples = self._directory.read_train()
        if self.examples:  # a job that only evaluates has none
            self._order = BatchOrder(len(self.examples), self._config.examples_per_step, self._config.seed)

    def used(self, steps: int) -> Sequence[int]:
        """The rows that the first `steps` steps draw."""
        return self._order.first(steps) if self._order is not None else ()

    def draw(self, step: int) -> Drawn:
        assert self._order is not None
        ids = self._order.batch(step)
        return Drawn(ids, self.of(ids))

    def of(self, numbers: Sequence[int]) -> tuple[EncodedExample, ...]:
        return tuple(self.examples[i] for i in numbers)

    def __len__(self) -> int:
        return len(self.examples)

    def forget(self) -> None:
        self.examples = ()


class GrowingRows:
    """Rows of a continual job: those of its training data, and those in `appended.jsonl` as far as it may be read. New
    rows enter at the next step that is drawn.

    Args:
        logged: the steps that the job has taken before; their last `appended` says what they have drawn from.
    """

    def __init__(self, directory: JobDir, config: JobConfig, logged: Sequence[StepRecord] = ()) -> None:
        self._directory, self._config = directory, config
        self._first: Sequence[EncodedExample] = ()
        self._appended: dict[int, EncodedExample] = {}
        """Number -> row, of appended rows that are kept and not deleted."""
        self._buffer: Buffer | None = None
        self._calls: deque[tuple[str, range]] = deque()
        """Key and numbers of the rows of each call, of those that have rows in `_appended`."""
        entered = [(record.step, record.appended) for record in logged if record.appended is not None]
        self._since, self._entered = entered[-1] if entered else (0, RowsSoFar())
        """The step at which rows last entered, and all that have entered."""
        self._so_far = RowsSoFar()
        """All rows in the buffer; more than `_entered` until the next step is drawn."""
        self._read_to = 0
        # Now and not when it has a lane: what is written later counts once the front end says that the disk has it.
        self._told = directory.appended.stat().st_size if directory.appended.exists() else 0

    def read(self) -> None:
        config, self._first = self._config, self._directory.read_train()
        self._buffer = Buffer(
            config.buffer_policy, config.buffer_rows, len(self._first), config.examples_per_step, config.seed
        )
        self._take_in(self._entered.count)
        if self._so_far != self._entered:
            raise ConfigError(
                f"{self._directory.appended} is not what the run has learnt from: the log has "
                f"{self._entered.count} rows with digest {self._entered.digest:08x}, the file {self._so_far.count} "
                f"with {self._so_far.digest:08x}. Put the file back, or start a new job."
            )

    def extend(self, size: int) -> None:
        """Read the file up to byte `size` before the next step."""
        self._told = max(size, self._told)

    def delete(self, key: str) -> None:
        """Draw no row of the call `key` any more."""
        for row in (row for known, rows in self._calls if known == key for row in rows):
            self._appended.pop(row, None)

    def draw(self, step: int) -> Drawn:
        assert self._buffer is not None
        self._take_in()
        if self._so_far != self._entered:
            self._since, self._entered = step, self._so_far
        ids = self._buffer.batch(step - self._since)
        # A step that was dropped is drawn again, and is still the first.
        first = self._since == step and self._entered.count > 0
        return Drawn(ids, self.of(ids), self._entered if first else None)

    def of(self, numbers: Sequence[int]) -> tuple[EncodedExample, ...]:
        return tuple(self._row(number) for number in numbers)

    def __len__(self) -> int:
        return len(self._first) + len(self._appended)

    def forget(self) -> None:
        self._first, self._buffer = (), None
        self._appended.clear()
        self._calls.clear()

    def _take_in(self, upto: int | None = None) -> None:
        """Read new calls, the first `upto` appended rows at most."""
        assert self._buffer is not None
        if self._read_to >= self._told:  # every step asks, and few find more
            return
        before = self._so_far
        for call, end in read_calls(self._directory.appended, self._read_to, self._told):
            if upto is not None and self._so_far.count + call.count > upto:
                break
            numbers = range(self._buffer.total, self._buffer.total + call.count)
            self._appended.update(zip(numbers, call.rows, strict=False))  # a deleted call has none
            self._calls.append((call.key, numbers))
            self._buffer.add(call.count)
            self._so_far, self._read_to = call.after(self._so_far), end
        if self._so_far != before:
            self._let_go(self._buffer.kept())

    def _let_go(self, kept: set[int]) -> None:
        self._appended = {row: example for row, example in self._appended.items() if row in kept}
        self._calls = deque((key, rows) for key, rows in self._calls if any(row in self._appended for row in rows))

    def _row(self, number: int) -> EncodedExample:
        """A row; in place of an appended one that was deleted, one that the job began with."""
        if number < len(self._first):
            return self._first[number]
        return self._appended.get(number) or self._first[number % len(self._first)]
