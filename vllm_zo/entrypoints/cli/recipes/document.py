"""Reads a YAML or TOML file into plain values, and remembers the line of each key for messages."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from vllm_zo.errors import ConfigError

Keys = tuple[str, ...]
"""Where a key stands: ("method", "rank")."""
VARIABLE = re.compile(r"\$(?P<escape>\$)?\{(?P<name>[^{}]*)\}")
DEEPEST = 4
"""Levels of keys whose lines are remembered; a deeper key goes by the line of the key that holds it."""
_TOML_KEY = re.compile(r"\s*(?P<table>\[\[?\s*)?(?P<key>[\w.\"'-]+)\s*(?(table)\]|=)")


@dataclass(frozen=True)
class Document:
    """A file's values.

    Attributes:
        name: the file as messages name it.
        lines: the line of each key that is known, from 1.
    """

    name: str
    values: dict[str, Any]
    lines: Mapping[Keys, int]

    def place(self, *path: str) -> str:
        """ "recipe.yaml, line 7": where a key stands, or the nearest one around it whose line is known."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.name}, line {self.lines[path[:end]]}"
        return self.name

    @contextlib.contextmanager
    def at(self, *path: str) -> Iterator[None]:
        """Puts the place of a key in front of the ConfigError that the block raises."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(f"{self.place(*path)}: {error}") from None


def read_document(path: Path) -> Document:
    """Read a file, and put the environment's values in for `${NAME}`.

    `${NAME:-text}` gives a default; `$${NAME}` stands for the text `${NAME}`. A value that is one variable alone is
    read as JSON where it is JSON, so that `steps: ${STEPS}` is a number.

    Raises:
        ConfigError: the file cannot be read, holds no mapping, names a key twice, or names a variable that is not set.
    """
    read = {".yaml": _read_yaml, ".yml": _read_yaml, ".toml": _read_toml}.get(path.suffix.lower())
    if read is None:
        raise ConfigError(f"{path}: expected a recipe that ends in .yaml, .yml or .toml.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (offset {error.start}).") from None
    try:
        values, lines = read(text, str(path))
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys with values, such as `steps: 400`.")
    document = Document(str(path), values, lines)
    return Document(document.name, _with_variables(document, values, ()), lines)


def _with_variables(document: Document, value: Any, path: Keys) -> Any:
    if isinstance(value, dict):
        return {key: _with_variables(document, inner, (*path, str(key))) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_variables(document, inner, path) for inner in value]
    if not isinstance(value, str):
        return value
    with document.at(*path):
        text = VARIABLE.sub(_value_of, value)
    alone = VARIABLE.fullmatch(value)
    if alone and not alone["escape"]:
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(text)
    return text


def _value_of(found: re.Match[str]) -> str:
    if found["escape"]:
        return found[0][1:]
    name, has_default, default = found["name"].partition(":-")
    value = os.environ.get(name, default if has_default else None)
    if value is None:
        raise ConfigError(
            f"{found[0]}: the environment has no variable {name!r}; set it, write ${{{name}:-a default}}, or "
            f"$${{{name}}} for the text itself."
        )
    return value


def escaped(value: Any) -> Any:
    """The value as a file must hold it to be read as it is: `${` in texts becomes `$${`."""
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(inner) for inner in value]
    return VARIABLE.sub(lambda found: f"${found[0]}", value) if isinstance(value, str) else value


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Reads plain words as YAML 1.2 does. In PyYAML's YAML 1.1 `no` is False, `1e-3` a text, and `010` is 8."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


class _Dumper(yaml.SafeDumper):
    """Writes in quotes what `_Loader` would not read as text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    for _part in (_Loader, _Dumper):
        _part.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_pattern})$"), _first)


def _read_yaml(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = {} if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}, line {mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: not valid YAML ({error.problem or error.context}).") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML ({error}).") from None
    lines: dict[Keys, int] = {}
    _note_lines(node, (), name, lines)
    return values, lines


def _note_lines(node: yaml.Node | None, path: Keys, name: str, lines: dict[Keys, int]) -> None:
    """Note the line of every key. YAML lets the last of two equal keys win, without a word; here it is an error."""
    if not isinstance(node, yaml.MappingNode) or len(path) == DEEPEST:
        return
    for key, value in node.value:
        at, line = (*path, str(key.value)), key.start_mark.line + 1
        if at in lines:
            raise ConfigError(f"{name}, line {line}: {key.value!r} stands in line {lines[at]} already; keep one.")
        lines[at] = line
        _note_lines(value, at, name, lines)


def to_yaml(values: Mapping[str, Any]) -> str:
    """The text that `read_document` reads as `values`."""
    return yaml.dump(escaped(dict(values)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


# --- TOML -------------------------------------------------------------------------------------------------------------


def _read_toml(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML ({error}).") from None
    return values, _toml_lines(text)


def _toml_lines(text: str) -> dict[Keys, int]:
    """The lines that begin with a key or a table's name: tomllib does not tell them."""
    table: Keys = ()
    lines: dict[Keys, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        found = _TOML_KEY.match(line)
        if found is None:
            continue
        parts = tuple(part.strip("\"' ") for part in found["key"].split("."))
        if found["table"]:
            table = parts
        lines.setdefault(parts if found["table"] else (*table, *parts), number)
    return lines
