"""The seed log of a job: its seed and the applied coefficients, which alone suffice to rebuild the state bit for bit.

It is a text file with one record a line. Each line ends in the crc32 of the text before it:

    vllm_zo seed log 1 {"job_seed":0,"method":"lozo",...} 5d3a9b11
    0 3e7ad7f29abcaf48 bf1c2e60 20359704
    1 = 3dcccccd 2e7d4448
    2 = !00000000 ec63045f

    column 1   step, from 0, without gaps or repeats
    column 2   learning rate: bit pattern of a float64, without trailing zeros; "=" if it equals that of the line above
    column 3   the K coefficients as applied: bit patterns of float32, separated by commas; "!" before them when a loss
               or a coefficient was not finite (the coefficients are then zeros)
    column 4   crc32

A job whose rows may grow (`JobConfig.continual`) writes format 2. There a step that is the first to draw from appended
rows has one column more, before the crc32:

    2 = 3d1a0000 +12:1c291ca3 5d3a9b11

    +12        all rows appended so far, since the beginning of the job
    1c291ca3   their digest: what `appended.jsonl` must hold (jobs/appended.py)

The rows that a step drew follow from the job's seed and these columns (data/buffer.py). So what was learnt, and when,
is in the log, and a resumed job draws as the unbroken one would have.

Why text: `grep '^1234 '` finds a step, `grep ' !'` the skipped ones, and any language can read it. Hexadecimal bit
patterns are exact and have a fixed size: 20,000 steps of one direction take 0.5 MB at a constant learning rate, and
0.8 MB with one that changes every step. The log holds no keys of directions: `Method.plan` derives them from the seed.

A crash damages the tail only. The reader takes every record up to the first line that is cut off, has another checksum,
or is not the next step, and reports where it stopped. Resuming cuts the file back to that point before it appends, so
no step has two records in a log; a repeat or a gap is damage. A resumed log has the bytes of an unbroken one.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

SAME_RATE = "="
NOT_FINITE = "!"
APPENDED = "+"


@dataclass(frozen=True)
class RowsSoFar:
    """Rows that were appended to a job.

    Attributes:
        count: how many.
        digest: crc32 over all calls that appended them.
    """

    count: int = 0
    digest: int = 0


@dataclass(frozen=True)
class StepRecord:
    """The values that one step applied.

    Attributes:
        step: from 0, without gaps.
        learning_rate: as applied, float64.
        coefficients: (K,) as applied, each a float32 value; zeros unless `finite`.
        finite: whether every loss and coefficient of the step was finite.
        appended: all rows appended so far, where the step is the first to draw from the last of them; else None.
    """

    step: int
    learning_rate: float
    coefficients: tuple[float, ...]
    finite: bool
    appended: RowsSoFar | None = None


def encode_line(payload: str) -> bytes:
    """`payload`, a space, its crc32 and a newline."""
    data = payload.encode()
    return b"%b %08x\n" % (data, zlib.crc32(data))


def decode_line(line: bytes) -> str:
    """The payload of a line that `encode_line` made. Raises ValueError: the line is cut off or its checksum wrong."""
    if not line.endswith(b"\n"):
        raise ValueError("the line is cut off")
    data, _, checksum = line[:-1].rpartition(b" ")
    if checksum != b"%08x" % zlib.crc32(data):
        raise ValueError("the checksum does not match")
    return data.decode()


def encode_record(record: StepRecord, previous_rate: float | None) -> bytes:
    """The line of a record; `previous_rate` is the learning rate of the line before it, if there is one."""
    # Bit patterns are compared: `==` would take -0.0 for 0.0, and never a nan for itself.
    same = previous_rate is not None and _pack_rate(record.learning_rate) == _pack_rate(previous_rate)
    rate = SAME_RATE if same else _pack_rate(record.learning_rate)
    coefficients = ",".join(struct.pack(">f", value).hex() for value in record.coefficients)
    flag = "" if record.finite else NOT_FINITE
    rows = "" if record.appended is None else f" {APPENDED}{record.appended.count}:{record.appended.digest:08x}"
    return encode_line(f"{record.step} {rate} {flag}{coefficients}{rows}")


def decode_record(line: bytes, previous_rate: float | None) -> StepRecord:
    """Inverse of `encode_record`. Raises ValueError: the line is damaged; the message says how."""
    step, rate, coefficients, *more = decode_line(line).split(" ")
    appended = _rows_of(*more) if more else None
    if rate != SAME_RATE:
        learning_rate = _unpack_rate(rate)
    elif previous_rate is None:
        raise ValueError("the first record has no learning rate")
    else:
        learning_rate = previous_rate
    words = [word for word in coefficients.removeprefix(NOT_FINITE).split(",") if word]
    values = tuple(_unpack("f", word) for word in words)
    return StepRecord(int(step), learning_rate, values, not coefficients.startswith(NOT_FINITE), appended)


def _rows_of(column: str) -> RowsSoFar:
    count, _, digest = column.removeprefix(APPENDED).partition(":")
    return RowsSoFar(int(count), int(digest, 16))


def _pack_rate(rate: float) -> str:
    return struct.pack(">d", rate).hex().rstrip("0") or "0"


def _unpack_rate(text: str) -> float:
    return _unpack("d", text.ljust(16, "0"))


def _unpack(kind: str, text: str) -> float:
    try:
        value: float = struct.unpack(f">{kind}", bytes.fromhex(text))[0]
    except struct.error as error:
        raise ValueError(f"{text!r} is not a bit pattern") from error
    return value
