"""Reading a seed log: its header and the intact prefix of its steps. The format is described in `seed_log.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vllm_zo.checkpoint.header import FORMAT_VERSION, SeedLogHeader
from vllm_zo.checkpoint.records import StepRecord, decode_line, decode_record, encode_line
from vllm_zo.errors import ConfigError, CorruptLogError

MAGIC = "vllm_zo seed log"


def header_line(header: SeedLogHeader) -> bytes:
    """The first line of a log."""
    return encode_line(f"{MAGIC} {FORMAT_VERSION} {header.to_json()}")


@dataclass(frozen=True)
class SeedLog:
    """The intact prefix of a log.

    Attributes:
        records: steps 0, 1, 2, ...
        intact: whether that is the whole file.
        note: what is wrong after the prefix and how many steps are usable; empty when intact.
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
        ConfigError: there is no such file.
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


def _read_header(path: Path, line: bytes) -> SeedLogHeader:
    fix = "No step can be rebuilt from it; use a snapshot or a published adapter of the job."
    try:
        payload = decode_line(line)
    except ValueError as error:
        raise CorruptLogError(f"{path}: damaged header ({error}). {fix}") from error
    version, _, fields = payload.removeprefix(f"{MAGIC} ").partition(" ")
    if version != str(FORMAT_VERSION):
        raise CorruptLogError(f"{path}: format {version!r}; this version of vllm_zo reads {FORMAT_VERSION}.")
    try:
        return SeedLogHeader.from_json(fields)
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptLogError(f"{path}: damaged header ({error!r}). {fix}") from error
