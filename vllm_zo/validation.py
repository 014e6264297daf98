"""Checks of user settings: every failure is a ConfigError that names the field, the value and what is accepted."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from vllm_zo.errors import ConfigError


def reject(name: str, value: object, expected: str, fix: str = "") -> NoReturn:
    """Raise `name=value: expected ...; fix`."""
    raise ConfigError(f"{name}={value!r}: expected {expected}" + (f"; {fix}" if fix else "") + ".")


def suggestion(word: str, known: Iterable[str]) -> str:
    """The sentence that follows an unknown word: the nearest known one, then all of them."""
    options = sorted(known)
    near = difflib.get_close_matches(word.lower(), options, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(options) or 'none'}."


def check_known(what: str, word: object, known: Iterable[str]) -> None:
    """Refuse a name that is not among `known`, with the nearest one."""
    options = list(known)
    if word not in options:
        raise ConfigError(f"unknown {what} {word!r}: {suggestion(str(word), options)}")


def check_keys(what: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """`check_known` for every key of a mapping."""
    options = list(known)
    for key in given:
        check_known(what, key, options)


def check_int(name: str, value: object, at_least: int, at_most: int | None = None, fix: str = "") -> None:
    """Refuse anything but an integer in the range; `True` is not an integer here."""
    accepted = f"an integer >= {at_least}" if at_most is None else f"an integer from {at_least} to {at_most}"
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
    above: float = -math.inf,
    below: float = math.inf,
    fix: str = "",
) -> None:
    """Refuse anything but a finite number with `value >= at_least`, `value > above` and `value < below`."""
    accepted = f"a number > {above:g}" if above > at_least else f"a number >= {at_least:g}"
    accepted += f" and < {below:g}" if below < math.inf else ""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        reject(name, value, accepted, fix)
    if value < at_least or value <= above or value >= below:
        reject(name, value, accepted, fix)


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        reject(name, value, "True or False")


def check_optional_str(name: str, value: object, what: str) -> None:
    if value is not None and not (isinstance(value, str) and value):
        reject(name, value, f"{what} as a non-empty string, or None")
