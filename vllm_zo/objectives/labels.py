"""Which class the label of a record means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from vllm_zo.errors import ConfigError

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def class_index(
    value: Any,
    options: Sequence[str],
    labels: Sequence[str | int | float] | None,
    where: str,
    *,
    numbers_are: str = "either",
    way_out: str = "set labels=[...]",
) -> int:
    """The index of the class that a record calls `value`: by its name in `labels`, by an option's text, or as an index.

    Texts compare without surrounding white space. Numbers compare by their value, however a file writes them (1, 1.0,
    "1", "1.0"): everything in a CSV file is text, and pandas turns a column of whole numbers with a gap into floats. An
    index counts from 0. If the labels are numbers themselves, a record cannot give an index. false and true are 0 and
    1.

    Args:
        numbers_are: what a number may be, if it is no name in `labels`: "index", "text" (of an option), or "either".
        way_out: what the message about an ambiguous number advises.

    Raises:
        ConfigError: the value is none of these, or ambiguous: 1 may be the option " 1" or the second option.
    """
    # `bool` first: it is an `int` in Python, and its text "True" would be no number.
    if isinstance(value, bool):
        value = int(value)
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    # A name in `labels` wins over everything else: the user wrote it for this data.
    named = _find(text, labels or ())
    if named is not None:
        return named
    number = _number(text)
    # With numbers as labels, 1 as an index would be a second meaning of the same number.
    by_number = numbers_are != "text" and not any(_number(str(label)) is not None for label in labels or ())
    index = None
    if by_number and number is not None and number == number.to_integral_value() and 0 <= number < len(options):
        index = int(number)
    named = None if numbers_are == "index" and number is not None else _find(text, options)
    if named is not None and index is not None and named != index:
        raise ConfigError(f"{where}: label {value!r} may be option {options[named]!r} or index {index}; {way_out}.")
    found = index if named is None else named
    if found is None:
        names = ", ".join(map(repr, labels or options))
        indices = f" and the indices 0 to {len(options) - 1}" if by_number else ""
        hint = f"; {way_out}" if numbers_are == "index" and _find(text, options) is not None else ""
        raise ConfigError(
            f"{where}: label {value!r:.60} is outside {'labels' if labels else 'options'} {names}{indices}{hint}."
        )
    return found


def _find(text: str, names: Sequence[str | int | float]) -> int | None:
    written = [str(name).strip() for name in names]
    if text in written:
        return written.index(text)
    number = _number(text)
    return None if number is None else next((i for i, name in enumerate(written) if _number(name) == number), None)


def _number(text: str) -> Decimal | None:
    # Decimal compares 0.1 and "0.10" exactly; the expression keeps out "nan", "inf" and "1_000", which it would accept.
    return Decimal(text) if _NUMBER.fullmatch(text.strip()) else None
