"""Reads a seed log: its header and the intact prefix of its steps. `format.py` describes the format."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vllm_zo.checkpoint.seed_log.format import StepRecord, decode_line, decode_record, encode_line
from vllm_zo.checkpoint.seed_log.header import CONTINUAL_VERSION, FORMAT_VERSION, SeedLogHeader
from vllm_zo.errors import ConfigError, CorruptLogError

MAGIC = "vllm_zo seed log"
TAIL_BYTES = 1 << 16
"""More than any few lines of a log have."""


def header_line(header: SeedLogHeader) -> bytes:
    """The first line of a log."""
    return encode_line(f"{MAGIC} {header.format_version} {header.to_json()}")


@dataclass(frozen=True)
class SeedLog:
    """The intact prefix of a log.

    Attributes:
        records: the records of steps 0, 1, 2, ...
        intact: whether the prefix is the whole file.
        note: the damage behind the prefix, and how many steps are usable; empty if the file is intact.
    """

    path: Path
    header: SeedLogHeader
    records: tuple[StepRecord, ...]
    intact: bool = True
    note: str = ""
    offsets: tuple[int, ...] = field(default=(), repr=False)
    """Byte offset after the header and after each record."""

    @property
    def num_steps(self) -> int:
        return len(self.records)


def read_seed_log(path: Path | str) -> SeedLog:
    """Read the whole intact prefix of a log.

    Raises:
        ConfigError: the file cannot be read.
        CorruptLogError: the header is damaged or of another format version, so that no step can be used.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ConfigError(f"seed log {path}: {error.strerror}; give the directory of a job that has run.") from error
    header = _read_header(path, lines[0] if lines else b"")
    records: list[StepRecord] = []
    offsets = [len(lines[0])]
    note = ""
    for line in lines[1:]:
        try:
            record = decode_record(line, records[-1].learning_rate if records else None)
            if record.step != len(records):
                raise ValueError(f"it holds step {record.step} where step {len(records)} belongs")
        except ValueError as error:
            usable = f"steps 0 to {len(records) - 1} are" if records else "no step is"
            note = f"{path}, line {len(records) + 2} (byte {offsets[-1]}): {error}; {usable} intact"
            break
        records.append(record)
        offsets.append(offsets[-1] + len(line))
    return SeedLog(path, header, tuple(records), not note, note, tuple(offsets))


def read_header(path: Path) -> SeedLogHeader:
    """The header alone. Raises OSError; CorruptLogError as `read_seed_log`."""
    with path.open("rb") as file:
        return _read_header(path, file.readline())


def logged_steps(path: Path) -> int:
    """How many steps a log that is being written has, read from its end: a log without end takes long to read whole.
    A step that is half written does not count. Raises OSError."""
    with path.open("rb") as file:
        start = max(0, file.seek(0, 2) - TAIL_BYTES)
        file.seek(start)
        lines = file.read().splitlines(keepends=True)[1:]  # the header, or what the cut has left of a line
    for line in reversed(lines):
        try:
            return int(decode_line(line).partition(" ")[0]) + 1
        except ValueError:
            continue
    return read_seed_log(path).num_steps if start else 0


def _read_header(path: Path, line: bytes) -> SeedLogHeader:
    fix = "No step can be rebuilt from it; use a snapshot or a published adapter of the job."
    try:
        payload = decode_line(line)
    except ValueError as error:
        raise CorruptLogError(f"{path}: damaged header ({error}). {fix}") from error
    version, _, fields = payload.removeprefix(f"{MAGIC} ").partition(" ")
    if version not in (str(FORMAT_VERSION), str(CONTINUAL_VERSION)):
        raise CorruptLogError(
            f"{path}: format {version!r}; this version of vllm_zo reads {FORMAT_VERSION} and {CONTINUAL_VERSION}."
        )
    try:
        return SeedLogHeader.from_json(fields)
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptLogError(f"{path}: damaged header ({error!r}). {fix}") from error
