"""`{{sample.output_text}}` and `{{item.field}}`: a grader reads by the names of fields, never by attributes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_zo.errors import ConfigError

NAMESPACES = ("sample", "item")
SAMPLE_FIELDS = ("output_text", "output_json")
MAX_LENGTH = 65_536
"""Characters of a template."""
# No part may start with an underscore, and there are no indices, calls or filters.
_PATH = re.compile(r"\s*([A-Za-z]\w*(?:\.[A-Za-z]\w*)+)\s*")


class VariableError(ConfigError):
    """A template asks for something that this sample or item does not have."""


@dataclass(frozen=True)
class Template:
    """Literal text and paths such as ("item", "answer"), in order.

    A path walks dictionaries only. It has no attribute, index, call or filter by which a client could reach other
    objects.

    Example:
        >>> Template.parse("input", "Answer: {{item.answer}}").render("42", {"answer": 42})
        'Answer: 42'

    Raises:
        ConfigError: on `parse`, if braces hold anything but such a path.
    """

    source: str
    parts: tuple[str | tuple[str, ...], ...]

    @classmethod
    def parse(cls, field: str, source: Any) -> Template:
        """`field` names the setting in messages, e.g. "grader.input"."""
        if not isinstance(source, str):
            raise ConfigError(f"{field}={source!r:.60}: expected a text such as '{{{{sample.output_text}}}}'.")
        if len(source) > MAX_LENGTH:
            raise ConfigError(f"{field}: at most {MAX_LENGTH} characters, not {len(source)}.")
        parts: list[str | tuple[str, ...]] = []
        for number, piece in enumerate(source.split("{{")):  # literal, then "tag}}literal" again and again
            tag, closed, literal = piece.partition("}}") if number else ("", "", piece)
            if "}}" in literal or (number and not closed):
                raise ConfigError(f"{field}={source!r:.60}: {{{{ and }}}} do not match; write {{{{item.field}}}}.")
            if number:
                parts.append(_parse_path(field, tag))
            if literal:
                parts.append(literal)
        return cls(source, tuple(parts))

    @property
    def item_fields(self) -> frozenset[str]:
        """The top-level fields of the item that the template reads."""
        return frozenset(part[1] for part in self.parts if not isinstance(part, str) and part[0] == "item")

    def render(self, output_text: str, item: Mapping[str, Any]) -> str:
        """Fill the template. Texts stay as they are; other values become JSON.

        Raises:
            VariableError: the item has no such field, or the template reads the output as JSON and it is none.
        """
        return "".join(p if isinstance(p, str) else _as_text(_look_up(p, output_text, item)) for p in self.parts)


def _parse_path(field: str, tag: str) -> tuple[str, ...]:
    match = _PATH.fullmatch(tag)
    path = tuple(match[1].split(".")) if match else ()
    if not path or path[0] not in NAMESPACES:
        raise ConfigError(
            f"{field}: {{{{{tag:.60}}}}} is refused: expected {{{{sample.output_text}}}} or {{{{item.<field>}}}}, "
            "plain names joined by dots (no indices, calls, filters or names that begin with an underscore)."
        )
    if path[0] == "sample" and (path[1] not in SAMPLE_FIELDS or (path[1] == "output_text" and len(path) > 2)):
        raise ConfigError(
            f"{field}: {{{{{tag:.60}}}}} is unknown: a sample has output_text, and output_json (its text read as JSON)."
        )
    return path


def _look_up(path: tuple[str, ...], output_text: str, item: Mapping[str, Any]) -> Any:
    value: Any = {"item": item, "sample": {"output_text": output_text}}
    if path[:2] == ("sample", "output_json"):
        try:
            value["sample"]["output_json"] = json.loads(output_text)
        except (ValueError, RecursionError) as error:  # RecursionError: a thousand brackets within each other
            raise VariableError(f"sample.output_json: the output is not JSON ({error}).") from None
    for depth, name in enumerate(path):
        if not isinstance(value, Mapping) or name not in value:
            have = ", ".join(map(repr, value)) if isinstance(value, Mapping) else "no fields"
            raise VariableError(f"{'.'.join(path)}: {'.'.join(path[:depth])} has no {name!r}; it has {have:.300}.")
        value = value[name]
    return value


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
