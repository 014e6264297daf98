"""One step as a line of the seed log, and back. The format is described in `seed_log.py`."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

SAME_RATE = "="
NOT_FINITE = "!"


@dataclass(frozen=True)
class StepRecord:
    """What one step applied.

    Attributes:
        step: from 0, without gaps.
        learning_rate: as applied, float64.
        coefficients: (K,) as applied, every one a float32 value; zeros when a loss was not finite.
        finite: whether every loss of the step was finite.
    """

    step: int
    learning_rate: float
    coefficients: tuple[float, ...]
    finite: bool


def encode_line(payload: str) -> bytes:
    """`payload`, a space, its crc32 and a newline."""
    data = payload.encode()
    return b"%b %08x\n" % (data, zlib.crc32(data))


def decode_line(line: bytes) -> str:
    """The payload of a line as `encode_line` made it. Raises ValueError naming what is wrong."""
    if not line.endswith(b"\n"):
        raise ValueError("the line is cut off")
    data, _, checksum = line[:-1].rpartition(b" ")
    if checksum != b"%08x" % zlib.crc32(data):
        raise ValueError("the checksum does not match")
    return data.decode()


def encode_record(record: StepRecord, previous_rate: float | None) -> bytes:
    """The line of a record; `previous_rate` is the learning rate of the line before it, if there is one."""
    same = previous_rate is not None and _pack_rate(record.learning_rate) == _pack_rate(previous_rate)
    rate = SAME_RATE if same else _pack_rate(record.learning_rate)
    coefficients = ",".join(struct.pack(">f", value).hex() for value in record.coefficients)
    flag = "" if record.finite else NOT_FINITE
    return encode_line(f"{record.step} {rate} {flag}{coefficients}")


def decode_record(line: bytes, previous_rate: float | None) -> StepRecord:
    """Inverse of `encode_record`. Raises ValueError naming what is wrong."""
    step, rate, coefficients = decode_line(line).split(" ")
    if rate != SAME_RATE:
        learning_rate = _unpack_rate(rate)
    elif previous_rate is None:
        raise ValueError("the first record has no learning rate")
    else:
        learning_rate = previous_rate
    words = [word for word in coefficients.removeprefix(NOT_FINITE).split(",") if word]
    values = tuple(_unpack("f", word) for word in words)
    return StepRecord(int(step), learning_rate, values, not coefficients.startswith(NOT_FINITE))


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
