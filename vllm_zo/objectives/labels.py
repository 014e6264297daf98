"""Which class a record's label means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_zo.errors import ConfigError


def class_index(value: Any, options: Sequence[str], labels: Sequence[str | int] | None, where: str) -> int:
    """Index of the class that a record calls `value`: by its name in `labels`, by an option's text, or as an index.

    Texts compare without surrounding white space and numbers as texts, because everything in a CSV file is text. An
    index counts from 0 and is not accepted where the labels are numbers themselves; false and true are 0 and 1.

    Raises:
        ConfigError: outside all of these, or ambiguous: 1 may be the option " 1" or the second option.
    """
    text = str(value).strip() if isinstance(value, str | int) else ""
    named = _find(text, labels or ())
    if named is not None:
        return named
    named = _find(text, options)
    by_number = not any(_is_number(label) for label in labels or ())
    number = int(value) if isinstance(value, bool) else int(text) if text.isdecimal() else None
    if number is None or not by_number or number >= len(options):
        number = None
    if named is not None and number is not None and named != number:
        raise ConfigError(
            f"{where}: label {value!r} may be option {options[named]!r} or index {number}; set labels=[...]."
        )
    found = number if named is None else named
    if found is None:
        names = ", ".join(map(repr, labels or options))
        indices = f" and the indices 0 to {len(options) - 1}" if by_number else ""
        raise ConfigError(
            f"{where}: label {value!r:.60} is outside {'labels' if labels else 'options'} {names}{indices}."
        )
    return found


def _find(text: str, names: Sequence[str | int]) -> int | None:
    return next((i for i, name in enumerate(names) if str(name).strip() == text), None)


def _is_number(label: str | int) -> bool:
    return str(label).strip().lstrip("+-").isdecimal()
