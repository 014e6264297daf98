"""Loads records from files, Hugging Face data sets, or any iterable of dictionaries."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vllm_zo.data.tables import read_columns, rows_of_table
from vllm_zo.errors import ConfigError
from vllm_zo.validation import check_unicode

Record = dict[str, Any]


class Examples(list[Record]):
    """Records, and the name of their source in messages ("train.jsonl")."""

    def __init__(self, records: Iterable[Record], source: str) -> None:
        super().__init__(records)
        self.source = source


HF_PREFIX = "hf:"
HF_SYNTAX = "hf:<data set>[:<configuration>]:<split>"
_HF_NAME = re.compile(r"hf:(?P<path>[^:]+)(:(?P<config>[^:]+))?:(?P<split>[^:\[]+(\[[^\]]*\])?)")


def load_examples(source: str | Path | Iterable[Mapping[str, Any]], split_name: str) -> Examples:
    """All records of a data source, in its order. Returns `Examples` as they are.

    Args:
        source: one of
            a path that ends in .jsonl (one JSON object a line), .json (a list of objects) or .csv (with a header line),
            UTF-8, each also compressed (.jsonl.gz); or in .parquet, .arrow or .feather;
            "hf:<data set>[:<configuration>]:<split>", as in "hf:glue:sst2:train" or "hf:stanfordnlp/sst2:train[:1000]";
            a `datasets.Dataset`, a table of pandas, polars or pyarrow, or any other iterable of dictionaries.
        split_name: the name of the argument ("train", "validation"), with which messages begin.

    Raises:
        ConfigError: the source is missing, is empty, or holds something that is not a record. For a file the message
            names the line.
    """
    if isinstance(source, Examples):
        return source
    if isinstance(source, str) and source.startswith(HF_PREFIX):
        records, name = _from_hub(source, split_name), source
    elif isinstance(source, str | Path):
        records, name = _from_file(Path(source), split_name), str(source)
    else:
        records, name = _from_iterable(source, split_name), type(source).__name__
    if not records:
        raise ConfigError(f"{split_name}={name!r}: no examples in it.")
    return Examples(records, str(source) if isinstance(source, str | Path) else split_name)


def _from_file(path: Path, split_name: str) -> list[Record]:
    compressed = path.suffix.lower() == COMPRESSED
    parse = PARSERS.get((path.with_suffix("") if compressed else path).suffix.lower())
    if parse is None:
        known = ", ".join(PARSERS)
        raise ConfigError(
            f"{split_name}={str(path)!r}: expected a file that ends in {known} (or one of these and {COMPRESSED}), or "
            f"{HF_SYNTAX}."
        )
    try:
        data = gzip.decompress(path.read_bytes()) if compressed else path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{split_name}={str(path)!r}: no such file (looked in {path.absolute().parent}).") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{split_name}={str(path)!r}: not a whole gzip file ({error}).") from None
    except OSError as error:
        raise ConfigError(f"{split_name}={str(path)!r}: cannot be read: {error.strerror}.") from None
    return parse(data, str(path))


def read_jsonl(lines: Iterable[bytes], name: str) -> Iterator[Record]:
    """The records of a JSONL file, for the command line and the server: one object a line, in UTF-8. Skips empty lines.

    A byte-order mark may begin any line: joined files of Windows programs have some in the middle.

    Args:
        lines: lines with their ends, as a file opened for bytes gives them. Only \\n ends a line, because a JSON string
            may hold other line separators (U+2028).
        name: the name of the file in messages.

    Raises:
        ConfigError: a line is not a JSON object in UTF-8; the message names the first.
    """
    for line, where, offset in _located(lines, name):
        if line.strip():
            yield _record_of(line, where, offset)


def _record_of(line: bytes, where: str, offset: int) -> Record:
    try:
        record = json.loads(_decoded(line, where, offset))
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        whole = line.endswith(b"\n")
        hint = "write one object a line" if whole else "the file ends in the middle of this record"
        raise ConfigError(f"{where}: not valid JSON ({reason}); {hint}.") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: expected a JSON object, found {_kind(record)}.")
    check_unicode(where, record)
    return record


def _decoded(data: bytes, where: str, offset: int = 0) -> str:
    """Decode UTF-8, without the byte-order mark if there is one. Raises ConfigError: the data is not UTF-8."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        # `error.start` counts from behind the byte-order mark, `offset` from the start of the file.
        marked = len(data) - len(error.object)
        raise ConfigError(
            f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {offset + marked + error.start}); "
            "convert the file, e.g. with iconv -t utf-8."
        ) from None


def _parse_jsonl(data: bytes, name: str) -> list[Record]:
    return list(read_jsonl(io.BytesIO(data), name))


def _parse_json(data: bytes, name: str) -> list[Record]:
    text = _decoded(data, name)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(
            f"{name}{where}: not valid JSON ({error}); a file with one object a line ends in .jsonl."
        ) from None
    if not isinstance(records, list):
        raise ConfigError(f"{name}: expected a list of JSON objects, found {_kind(records)}.")
    return _from_iterable(records, name)


def _parse_csv(data: bytes, name: str) -> list[Record]:
    # Decoded line by line to name the line of a bad byte, then parsed as a whole: a quoted field may span lines.
    text = "".join(_decoded(*line) for line in _located(io.BytesIO(data), name))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    records = []
    try:
        for row in filter(None, reader):
            if header is None:
                header = _check_header(row, name)
            elif len(row) != len(header):
                raise ConfigError(
                    f"{name}, line {reader.line_num}: {len(row)} columns, the header has {len(header)}; "
                    "put texts that hold a comma in double quotes."
                )
            else:
                records.append(dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise ConfigError(f"{name}, line {reader.line_num}: not valid CSV ({error}).") from None
    return records


def _located(lines: Iterable[bytes], name: str) -> Iterator[tuple[bytes, str, int]]:
    """Yields (line, its name in messages, its offset in the file in bytes)."""
    offset = 0
    for number, line in enumerate(lines, start=1):
        yield line, f"{name}, line {number}", offset
        offset += len(line)


def _check_header(columns: list[str], name: str) -> list[str]:
    """The names of the columns. Refuses blanks, repeats and numbers: they are signs that the header is missing."""
    columns = [column.strip() for column in columns]
    if len(set(columns)) < len(columns) or any(not c or _is_number(c) for c in columns):
        raise ConfigError(f"{name}, line 1: {columns!r} is not a header; the first line must name the columns.")
    return columns


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _from_hub(source: str, split_name: str) -> list[Record]:
    match = _HF_NAME.fullmatch(source)
    if match is None:
        raise ConfigError(f"{split_name}={source!r}: expected {HF_SYNTAX}, as in hf:glue:sst2:train.")
    # Here, not at the top: the package is optional.
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{split_name}={source!r}: the package `datasets` is not installed; pip install 'vllm-zo[datasets]'."
        ) from None
    try:
        dataset = datasets.load_dataset(match["path"], match["config"], split=match["split"])
    except Exception as error:  # the library raises whatever its network stack or the data set's builder raises
        raise ConfigError(f"{split_name}={source!r}: cannot be loaded: {error}") from error
    return _from_iterable(dataset, split_name)


def _from_iterable(source: object, split_name: str) -> list[Record]:
    source = rows_of_table(source)
    if isinstance(source, Mapping):
        keys = ", ".join(map(repr, source))
        raise ConfigError(f"{split_name} is a mapping with keys {keys}: give one split of it, or a list of records.")
    if not isinstance(source, Iterable):
        raise ConfigError(
            f"{split_name}={source!r:.60}: expected a path, hf:<data set>:<split>, or records (dictionaries)."
        )
    records = []
    for number, record in enumerate(source, start=1):
        if not isinstance(record, Mapping):
            raise ConfigError(f"{split_name}, row {number}: expected a dictionary, found {_kind(record)}.")
        plain = {name: _plain(value) for name, value in record.items()}
        check_unicode(f"{split_name}, row {number}", plain)
        records.append(plain)
    return records


def _plain(value: Any) -> Any:
    """The JSON value for a value of a data frame: numpy's numbers and arrays, and pandas' missing values."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    # By name: pandas need not be installed.
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def _kind(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"


def _parse_columns(data: bytes, name: str) -> list[Record]:
    return _from_iterable(read_columns(data, name), name)


PARSERS: dict[str, Callable[[bytes, str], list[Record]]] = {
    ".jsonl": _parse_jsonl,
    ".json": _parse_json,
    ".csv": _parse_csv,
    ".parquet": _parse_columns,
    ".arrow": _parse_columns,
    ".feather": _parse_columns,
}
COMPRESSED = ".gz"
