"""Checks of user settings. Every failure is a ConfigError that names the field, the value and what is accepted."""

from __future__ import annotations

import contextlib
import difflib
import math
import numbers
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from vllm_zo.errors import ConfigError


def reject(name: str, value: object, expected: str, fix: str = "") -> NoReturn:
    """Raise ConfigError with `name=value: expected ...; fix`."""
    raise ConfigError(f"{name}={value!r}: expected {expected}" + (f"; {fix}" if fix else "") + ".")


def suggestion(word: str, known: Iterable[str]) -> str:
    """A sentence for messages about an unknown word: the nearest known word, then all known words."""
    options = sorted(known)
    near = difflib.get_close_matches(word.lower(), options, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(options) or 'none'}."


def check_known(what: str, word: object, known: Iterable[str]) -> None:
    """Raise ConfigError, with the nearest known name, if `word` is not among `known`."""
    options = list(known)
    if word not in options:
        raise ConfigError(f"unknown {what} {word!r}: {suggestion(str(word), options)}")


def check_keys(what: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """`check_known` for every name in a mapping."""
    options = list(known)
    for key in given:
        check_known(what, key, options)


def check_int(name: str, value: object, at_least: float, at_most: float | None = None, fix: str = "") -> None:
    """Raise ConfigError unless `value` is an integer in the range. `True` is not an integer here."""
    accepted = "an integer" if at_least == -math.inf else f"an integer >= {at_least}"
    accepted = accepted if at_most is None else f"an integer from {at_least} to {at_most}"
    if isinstance(value, bool) or not isinstance(value, int):
        reject(name, value, accepted, fix)
    if value < at_least or (at_most is not None and value > at_most):
        reject(name, value, accepted, fix)


def check_optional_int(name: str, value: object, at_least: int, fix: str = "") -> None:
    if value is not None:
        check_int(name, value, at_least, fix=fix)


def check_float(
    name: str,
    value: object,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    fix: str = "",
) -> None:
    """Raise ConfigError unless `value` is a finite number in the range, which excludes `above` and `below`."""
    accepted = f"a number > {above:g}" if above > at_least else f"a number >= {at_least:g}"
    accepted = "a finite number" if max(above, at_least) == -math.inf else accepted
    accepted += f" and < {below:g}" if below < math.inf else ""
    accepted += f" and <= {at_most:g}" if at_most < math.inf else ""
    # Not `math.isfinite`: it raises OverflowError for an integer that no float can hold.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        reject(name, value, accepted, fix)
    if not (at_least <= value <= at_most and above < value < below):
        reject(name, value, accepted, fix)


def read_int(name: str, value: Any) -> Any:
    """The integer in `value`: 3, "3", "1e3" or numpy's. Any other value is returned as it is; `check_int` refuses it.

    YAML, forms and query strings bring numbers as text. YAML takes even a plain 1e3 for text.
    """
    number = _number(value)
    return int(number) if isinstance(value, str) and isinstance(number, float) and number.is_integer() else number


def read_float(name: str, value: Any, **ends: Any) -> float:
    """The number in `value`, for example "1e-5".

    Args:
        ends: the range, as for `check_float`.

    Raises:
        ConfigError: the value is no number, or is out of range.
    """
    number = _number(value)
    check_float(name, number, **ends)
    return float(number)


def _number(value: Any) -> Any:
    """Python's number for a text or for a number of numpy. Any other value, also True and False, as it is."""
    if isinstance(value, str):
        # int first, so that "3" does not become 3.0, and large integers keep all their digits.
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    if type(value) not in (bool, int, float) and isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        reject(name, value, "True or False")


def check_optional_str(name: str, value: object, what: str) -> None:
    if value is not None and not (isinstance(value, str) and value):
        reject(name, value, f"{what} as a non-empty string, or None")


_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_INTEGER = (1 << 64) - 1
"""The largest integer that every JSON parser here reads as an integer."""


def check_unicode(name: str, value: object) -> None:
    """Refuse a lone surrogate, half a character, in any text of `value`: no tokenizer takes it, and UTF-8 has no form
    for it.

    Args:
        value: texts, also inside lists and mappings.

    Raises:
        ConfigError: the message names the field within `value`, the position and the fix.
    """
    for path, leaf in _leaves(value):
        if isinstance(leaf, str):
            _check_characters(f"{name}{path}", leaf)


def _check_characters(where: str, text: str) -> None:
    # Python knows whether a text is ASCII without reading it, and most texts are.
    if not text.isascii() and (found := _SURROGATE.search(text)):
        raise ConfigError(
            f"{where}: half a character (a lone surrogate, U+{ord(found[0]):04X}) at position {found.start()}; write "
            "the whole character, or leave it out."
        )


def check_json(name: str, value: object) -> None:
    """Refuse what Python's parser takes from a client's JSON and no answer can hold: half a character, NaN, an
    infinity, an integer of more than 64 bits.

    Raises:
        ConfigError: the message names the field within `value`.
    """
    for path, leaf in _leaves(value):
        if isinstance(leaf, str):
            _check_characters(f"{name}{path}", leaf)
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ConfigError(f"{name}{path}={leaf}: JSON has no such number; write a finite one.")
        if isinstance(leaf, int) and abs(leaf) > MAX_INTEGER:
            raise ConfigError(f"{name}{path}: an integer of more than 64 bits; write a smaller one.")


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(place, leaf) for every text, number, True, False and None in a value from JSON. The names of an object's fields
    are texts too."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str):
                yield f"{path}, a name of a field", key
                yield from _leaves(inner, f"{path}.{key}" if path else f", field {key!r}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value
