"""Where records come from: files, Hugging Face data sets, or whatever yields dictionaries."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_zo.errors import ConfigError

Record = dict[str, Any]

HF_PREFIX = "hf:"
HF_SYNTAX = "hf:<data set>[:<configuration>]:<split>"
_HF_NAME = re.compile(r"hf:(?P<path>[^:]+)(:(?P<config>[^:]+))?:(?P<split>[^:\[]+(\[[^\]]*\])?)")


def load_examples(source: str | Path | Iterable[Mapping[str, Any]], split_name: str) -> list[Record]:
    """All records of a data source, in its order.

    Args:
        source: one of
            a path that ends in .jsonl (one JSON object a line) or .csv (with a header line), UTF-8;
            "hf:<data set>[:<configuration>]:<split>", as in "hf:glue:sst2:train" or "hf:stanfordnlp/sst2:train[:1000]";
            a `datasets.Dataset`, or any other iterable of dictionaries.
        split_name: which argument this is ("train", "validation"); it begins the messages.

    Raises:
        ConfigError: nothing there, nothing in it, or something that is not a record. Files name the line.
    """
    if isinstance(source, str) and source.startswith(HF_PREFIX):
        records, name = _from_hub(source, split_name), source
    elif isinstance(source, str | Path):
        records, name = _from_file(Path(source), split_name), str(source)
    else:
        records, name = _from_iterable(source, split_name), type(source).__name__
    if not records:
        raise ConfigError(f"{split_name}={name!r}: no examples in it.")
    return records


def _from_file(path: Path, split_name: str) -> list[Record]:
    parse = PARSERS.get(path.suffix.lower())
    if parse is None:
        known = " or ".join(PARSERS)
        raise ConfigError(f"{split_name}={str(path)!r}: expected a file that ends in {known}, or {HF_SYNTAX}.")
    return parse(_read_text(path, split_name), str(path))


def _read_text(path: Path, split_name: str) -> str:
    """Contents of a UTF-8 file, without a byte-order mark."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{split_name}={str(path)!r}: no such file (looked in {path.absolute().parent}).") from None
    except OSError as error:
        raise ConfigError(f"{split_name}={str(path)!r}: cannot be read: {error.strerror}.") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.start counts from behind a byte-order mark, error.object is what it counts in
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start}); "
            "convert the file, e.g. with iconv -t utf-8."
        ) from None


def _parse_jsonl(text: str, name: str) -> list[Record]:
    records = []
    lines = text.split("\n")  # not splitlines: JSON strings may hold U+2028 as it is
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            hint = "the file ends in the middle of this record" if number == len(lines) else "write one object a line"
            raise ConfigError(f"{name}, line {number}: not valid JSON ({reason}); {hint}.") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{name}, line {number}: expected a JSON object, found {_kind(record)}.")
        records.append(record)
    return records


def _parse_csv(text: str, name: str) -> list[Record]:
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


def _check_header(columns: list[str], name: str) -> list[str]:
    """Distinct names. Blanks, repeats and numbers are signs of a first row of data."""
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
        records.append(dict(record))
    return records


def _kind(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"


PARSERS: dict[str, Callable[[str, str], list[Record]]] = {".jsonl": _parse_jsonl, ".csv": _parse_csv}
