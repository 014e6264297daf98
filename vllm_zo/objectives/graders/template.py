"""`{{sample.output_text}}` and `{{item.field}}`: what a grader may read, by name and never by attribute."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_zo.errors import ConfigError

NAMESPACES = ("sample", "item")
SAMPLE_FIELDS = ("output_text", "output_json")
_TAG = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_PATH = re.compile(r"\s*([A-Za-z]\w*(?:\.[A-Za-z]\w*)+)\s*")


class VariableError(ConfigError):
    """A template asks for something that this sample or item does not have."""


@dataclass(frozen=True)
class Template:
    """Literal text and paths such as ("item", "answer"), in order.

    A path walks dictionaries only: there is no attribute, index, call or filter, hence nothing to escape from.

    Example:
        >>> Template.parse("input", "Answer: {{item.answer}}").render("42", {"answer": 42})
        'Answer: 42'

    Raises:
        ConfigError: on `parse`, anything in braces that is not such a path.
    """

    source: str
    parts: tuple[str | tuple[str, ...], ...]

    @classmethod
    def parse(cls, field: str, source: Any) -> Template:
        """`field` names the setting in messages, e.g. "grader.input"."""
        if not isinstance(source, str):
            raise ConfigError(f"{field}={source!r:.60}: expected a text such as '{{{{sample.output_text}}}}'.")
        pieces = _TAG.split(source)  # literal, tag, literal, ...
        parts: list[str | tuple[str, ...]] = []
        for index, piece in enumerate(pieces):
            parts.append(_parse_path(field, piece) if index % 2 else _check_literal(field, piece))
        return cls(source, tuple(part for part in parts if part))

    @property
    def item_fields(self) -> frozenset[str]:
        """Top-level fields of the item that are read."""
        return frozenset(part[1] for part in self.parts if not isinstance(part, str) and part[0] == "item")

    def render(self, output_text: str, item: Mapping[str, Any]) -> str:
        """Fill in. Texts stay as they are; anything else is written as JSON.

        Raises:
            VariableError: the item has no such field, or the output is not the JSON it is read as.
        """
        return "".join(p if isinstance(p, str) else _as_text(_look_up(p, output_text, item)) for p in self.parts)


def _check_literal(field: str, text: str) -> str:
    if "{{" in text or "}}" in text:
        raise ConfigError(f"{field}={text!r:.60}: {{{{ and }}}} do not match; write {{{{item.field}}}}.")
    return text


def _parse_path(field: str, tag: str) -> tuple[str, ...]:
    match = _PATH.fullmatch(tag)
    path = tuple(match[1].split(".")) if match else ()
    if not path or path[0] not in NAMESPACES:
        raise ConfigError(
            f"{field}: {{{{{tag}}}}} is refused: expected {{{{sample.output_text}}}} or {{{{item.<field>}}}}, plain "
            "names joined by dots (no indices, calls, filters or names that begin with an underscore)."
        )
    if path[0] == "sample" and (path[1] not in SAMPLE_FIELDS or (path[1] == "output_text" and len(path) > 2)):
        raise ConfigError(
            f"{field}: {{{{{tag}}}}} is unknown: a sample has output_text, and output_json (its text read as JSON)."
        )
    return path


def _look_up(path: tuple[str, ...], output_text: str, item: Mapping[str, Any]) -> Any:
    value: Any = {"item": item, "sample": {"output_text": output_text}}
    if path[:2] == ("sample", "output_json"):
        try:
            value["sample"]["output_json"] = json.loads(output_text)
        except ValueError as error:
            raise VariableError(f"sample.output_json: the output is not JSON ({error}).") from None
    for depth, name in enumerate(path):
        if not isinstance(value, Mapping) or name not in value:
            have = ", ".join(map(repr, value)) if isinstance(value, Mapping) else "no fields"
            raise VariableError(f"{'.'.join(path)}: {'.'.join(path[:depth])} has no {name!r}; it has {have}.")
        value = value[name]
    return value


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
