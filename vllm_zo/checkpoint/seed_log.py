"""The seed log of a job: seeds and applied coefficients, from which alone the state is rebuilt bit for bit.

A text file, one record a line, each line ending in the crc32 of what stands before it:

    vllm_zo seed log 1 {"job_seed":0,"method":"lozo",...} 5d3a9b11
    0 3e7ad7f29abcaf48 bf1c2e60 20359704
    1 = 3dcccccd 2e7d4448
    2 = !00000000 ec63045f

    column 1   step, from 0, without gaps or repeats
    column 2   learning rate: bit pattern of a float64, trailing zeros dropped; "=" if it is that of the line above
    column 3   the K coefficients as applied: bit patterns of float32, separated by commas; "!" before them when a loss
               was not finite (the coefficients are then zeros)
    column 4   crc32

Why text: `grep '^1234 '` finds a step, `grep ' !'` the skipped ones, and any language can read it. Hexadecimal bit
patterns are exact and have a fixed size: 20,000 steps of one direction take 0.5 MB at a constant learning rate,
0.8 MB with one that changes every step. Direction seeds are not written: `Method.plan` derives them from the job's.

A crash damages the tail only. The reader takes every record up to the first line that is cut off, has another checksum,
or is not the next step, and says where it stopped. Resuming cuts the file back to that point (or further, to
`keep_steps`) before it appends, so a step never stands twice in a log; a repeat or a gap is damage.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.checkpoint.header import SeedLogHeader
from vllm_zo.checkpoint.log_reader import SeedLog, header_line, read_seed_log
from vllm_zo.checkpoint.records import StepRecord, encode_record
from vllm_zo.errors import ConfigError, JobError
from vllm_zo.validation import reject

__all__ = ["SeedLog", "SeedLogHeader", "SeedLogWriter", "StepRecord", "read_seed_log"]

logger = logging.getLogger("vllm.zo")

MAX_FLUSH_INTERVAL_S = 1.0
"""What a crash may cost: the contract is one flush a second."""


class SeedLogWriter:
    """Appends steps to a log without ever making the caller wait for the disk.

    `append` queues; a thread writes and fsyncs every `flush_interval_s`. Bytes leave memory only after an fsync that
    covers them: after a failure (disk full) the same bytes are written to the same place at the next interval, because
    a failed fsync may have dropped pages that a later one reports as clean. One instance a job, in the engine process.

    Args:
        flush_interval_s: seconds between flushes, at most 1.
        resume: continue an existing log: cut a damaged tail off and append. The log must be of the same job.
        keep_steps: with `resume`, also cut the log back to its first `keep_steps` steps.

    Raises:
        ConfigError: the log exists (without `resume`), is another job's, is shorter than `keep_steps`, or is in use.
        CorruptLogError: `resume` and the header cannot be read.
        JobError: the disk refuses the header.
    """

    def __init__(
        self,
        path: Path | str,
        header: SeedLogHeader,
        flush_interval_s: float = 0.5,
        resume: bool = False,
        keep_steps: int | None = None,
    ) -> None:
        if not 0 < flush_interval_s <= MAX_FLUSH_INTERVAL_S:
            reject("flush_interval_s", flush_interval_s, f"a number in (0, {MAX_FLUSH_INTERVAL_S:g}]")
        self.path = Path(path)
        self.next_step = 0
        """The only step `append` accepts next."""
        self.error: JobError | None = None
        """Why the last flush failed; None again once a later one has written everything."""
        self._rate: float | None = None
        if not resume:
            self._create(header)
        self._fd = self._open()
        try:
            self._lock()
            self._offset = self._continue(header, keep_steps) if resume else self.path.stat().st_size
        except BaseException:
            os.close(self._fd)
            raise
        self._unsynced = bytearray()
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._interval_s = flush_interval_s
        self._thread = threading.Thread(target=self._run, name="zo-seed-log", daemon=True)
        self._thread.start()

    def append(self, step: int, learning_rate: float, coefficients: Sequence[float], finite: bool) -> None:
        """Queue a step. Returns at once; look at `error` for the disk's answer.

        Raises:
            JobError: `step` is not the next one (the log would not replay), or the writer is closed.
        """
        if step != self.next_step or self._closing.is_set():
            state = "is closed" if self._closing.is_set() else f"expects step {self.next_step}"
            raise JobError(f"seed log {self.path}: cannot append step {step}, the log {state}.")
        record = StepRecord(step, float(learning_rate), tuple(coefficients), finite)
        self._queue.put(encode_record(record, self._rate))
        self._rate = record.learning_rate
        self.next_step += 1

    def close(self) -> None:
        """Write what is queued and stop. Never raises: afterwards `error` says whether everything is on disk."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        os.close(self._fd)
        if self.error is not None:
            logger.error("%s", self.error)

    def _create(self, header: SeedLogHeader) -> None:
        if self.path.exists():
            raise ConfigError(f"seed log {self.path} exists already; resume that job, or use another directory.")
        write_atomically(self.path, header_line(header))

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR)
        except OSError as error:
            raise ConfigError(f"seed log {self.path}: {error.strerror}; to start a new job, do not resume.") from error

    def _lock(self) -> None:
        """One writer a log. File systems without locks are used without."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"seed log {self.path} is being written by a running job; stop that one first.") from None
        except OSError as error:
            logger.warning("seed log %s cannot be locked (%s): let one job only write it", self.path, error.strerror)

    def _continue(self, header: SeedLogHeader, keep_steps: int | None) -> int:
        """Cut the log back to the steps to keep; returns its new size in bytes."""
        log = read_seed_log(self.path)
        header.check_resumes(log.header)
        if keep_steps is not None and not 0 <= keep_steps <= log.num_steps:
            raise ConfigError(
                f"keep_steps={keep_steps}: {self.path} holds {log.num_steps} intact steps. {log.note}".rstrip()
            )
        self.next_step = log.num_steps if keep_steps is None else keep_steps
        if log.note:
            logger.warning("%s; the rest is cut off", log.note)
        os.ftruncate(self._fd, log.offsets[self.next_step])
        os.fsync(self._fd)
        return log.offsets[self.next_step]

    def _run(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(self._interval_s)
            with contextlib.suppress(queue.Empty):
                while True:
                    self._unsynced += self._queue.get_nowait()
            if self._unsynced:
                self._flush()

    def _flush(self) -> None:
        try:
            self._write(bytes(self._unsynced), self._offset)
            os.fsync(self._fd)
        except OSError as error:
            lines = self._unsynced.count(b"\n")
            self.error = JobError(
                f"seed log {self.path}: {error.strerror} with {lines} steps not yet on disk; free space, then resume."
            )
            return
        self._offset += len(self._unsynced)
        self._unsynced.clear()
        self.error = None

    def _write(self, data: bytes, offset: int) -> None:
        """All of `data`; a full disk may take a part first and say no to the rest."""
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written
