"""Writes a seed log (see `format.py`) in a thread, so that the caller does not wait for the disk."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from vllm_zo.checkpoint.append import AppendFile
from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.checkpoint.seed_log.format import RowsSoFar, StepRecord, encode_record
from vllm_zo.checkpoint.seed_log.header import SeedLogHeader
from vllm_zo.checkpoint.seed_log.reader import header_line, read_seed_log
from vllm_zo.errors import ConfigError, JobError
from vllm_zo.validation import reject

logger = logging.getLogger("vllm.zo")

MAX_FLUSH_INTERVAL_S = 1.0
"""Seconds; a crash of the machine may cost the steps of so long a time."""


class SeedLogWriter:
    """Appends steps to a log without making the caller wait for the disk.

    `append` queues a step; a thread writes and fsyncs every `flush_interval_s`. Steps that a full disk refuses stay in
    memory until the next interval. The engine process has one instance for each job.

    Args:
        flush_interval_s: seconds between flushes, at most 1.
        resume: continue an existing log: cut off a damaged tail, then append. The log must belong to the same job.

    Raises:
        ConfigError: the log exists (without `resume`) or does not (with it), belongs to another job, or is in use.
        CorruptLogError: with `resume`, the header cannot be read.
        JobError: the disk refuses the header.
    """

    def __init__(
        self,
        path: Path | str,
        header: SeedLogHeader,
        flush_interval_s: float = 0.5,
        resume: bool = False,
    ) -> None:
        if not 0 < flush_interval_s <= MAX_FLUSH_INTERVAL_S:
            reject("flush_interval_s", flush_interval_s, f"a number in (0, {MAX_FLUSH_INTERVAL_S:g}]")
        self.path = Path(path)
        self.next_step = 0
        """The only step that `append` accepts next."""
        self._rate: float | None = None
        if not resume:
            self._create(header)
        elif not self.path.exists():
            raise ConfigError(f"seed log {self.path} does not exist; to start a new job, do not resume.")
        # Not on the log itself: opening a lock file empties it. Not thread-local: another thread may close the log. Not
        # soft: that falls back to a marker file, which a killed process leaves behind.
        self._lock = FileLock(
            f"{self.path}.lock", mode=0o600, blocking=False, thread_local=False, fallback_to_soft=False
        )
        try:
            self._take_lock()
            size = self._good_size(header) if resume else None
            self._file = AppendFile(self.path, size, unit="steps", durable=True)
        except OSError as error:
            self._lock.release()
            raise ConfigError(f"seed log {self.path}: {error.strerror}.") from error
        except BaseException:
            self._lock.release()
            raise
        self._one_flush = threading.Lock()
        """Held while steps go from the queue to the file. The engine may call `flush` while the thread does: without
        the lock the two could mix the order of the steps."""
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._interval_s = flush_interval_s
        self._thread = threading.Thread(target=self._run, name="zo-seed-log", daemon=True)
        self._thread.start()

    def append(
        self,
        step: int,
        learning_rate: float,
        coefficients: Sequence[float],
        finite: bool,
        appended: RowsSoFar | None = None,
    ) -> None:
        """Queue a step and return at once. `error` tells later whether the disk refused it.

        Raises:
            JobError: `step` is not the next one (the log would not replay), or the writer is closed.
        """
        if step != self.next_step or self._closing.is_set():
            state = "is closed" if self._closing.is_set() else f"expects step {self.next_step}"
            raise JobError(f"seed log {self.path}: cannot append step {step}, the log {state}.")
        record = StepRecord(step, float(learning_rate), tuple(coefficients), finite, appended)
        self._queue.put(encode_record(record, self._rate))
        self._rate = record.learning_rate
        self.next_step += 1

    def follow(self, file: AppendFile) -> None:
        """Bring `file` to disk before each write of steps: after a power cut the log has no step that `file` lacks. The
        file must be closed after this log."""
        self._file.before_write = file.sync

    @property
    def error(self) -> JobError | None:
        """Why the last flush failed; None again once a later one has written everything."""
        return self._file.error

    def flush(self) -> None:
        """Write the queued steps and wait for the disk. Afterwards `error` tells whether everything is on disk."""
        with self._one_flush:
            self._take_queued()
            self._file.flush()

    def hand_over(self) -> bool:
        """Write the queued steps, and do not wait for the disk. Afterwards they outlive this process, and any process
        can read them. Returns whether the file took them; if not, `error` says why."""
        with self._one_flush:
            self._take_queued()
            return self._file.hand_over()

    def _take_queued(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._file.add(self._queue.get_nowait())

    def close(self) -> None:
        """Write the queued steps and stop. Afterwards `error` tells whether everything is on disk."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()  # before the file is closed: the thread flushes once more
        self._file.close()
        self._lock.release()
        if self.error is not None:
            logger.error("%s", self.error)

    def _create(self, header: SeedLogHeader) -> None:
        if self.path.exists():
            raise ConfigError(f"seed log {self.path} exists already; resume that job, or use another directory.")
        write_atomically(self.path, header_line(header))

    def _take_lock(self) -> None:
        """Make sure that a log has one writer. The system frees the lock when the process ends, even when it is killed.

        On a file system without locks a warning must do.

        Raises:
            ConfigError: another job writes the log.
        """
        try:
            self._lock.acquire()
        except Timeout:
            raise ConfigError(f"seed log {self.path} is being written by a running job; stop that one first.") from None
        except (OSError, NotImplementedError) as error:
            logger.warning("seed log %s cannot be locked (%s): make sure that only one job writes it", self.path, error)

    def _good_size(self, header: SeedLogHeader) -> int:
        """How many bytes of the log are intact. Raises ConfigError: the log belongs to another job."""
        log = read_seed_log(self.path)
        header.check_resumes(log.header)
        self.next_step = log.num_steps
        if log.records:
            self._rate = log.records[-1].learning_rate
        if log.note:
            logger.warning("%s; the rest is cut off", log.note)
        return log.offsets[-1]

    def _run(self) -> None:
        # The test comes before the last flush: a step that was queued just before `close` is written, too.
        closing = False
        while not closing:
            closing = self._closing.wait(self._interval_s)
            self.flush()
