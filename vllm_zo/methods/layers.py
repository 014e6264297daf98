"""Which of the model's numbered layers a job trains: the option `target_layers`."""

from __future__ import annotations

import re

from vllm_zo.errors import ConfigError
from vllm_zo.validation import reject

NAMED = {"last": 0, "top-third": 3, "top-half": 2}
"""Names of common choices: the layers from the top, as the part of all layers that this number divides off. "last" is
the last layer alone."""
SYNTAX = f"layers such as '20:', '-10:' or '0,5,20:25', or one of {', '.join(NAMED)}"
_NUMBER = re.compile(r"\.(\d+)\.")
_PART = re.compile(r"(-?\d{1,6})|(-?\d{1,6})?:(-?\d{1,6})?", re.ASCII)
MAX_LENGTH = 1000
"""Characters of a choice, which may come from a client of a server."""


def layer_of(name: str) -> int | None:
    """The number of the layer that a module belongs to; None for a module outside the numbered layers.

    Example:
        >>> layer_of("model.layers.20.mlp.up_proj"), layer_of("lm_head")
        (20, None)
    """
    found = _NUMBER.search(name)
    return int(found[1]) if found else None


def check_layers(target_layers: str) -> None:
    """Check how a choice is written.

    Raises:
        ConfigError: it is no list of numbers, slices and names.
    """
    if not isinstance(target_layers, str) or len(target_layers) > MAX_LENGTH:
        reject("target_layers", target_layers, SYNTAX)
    for part in target_layers.split(","):
        if part.strip() not in NAMED and not _PART.fullmatch(part.strip()):
            reject("target_layers", target_layers, SYNTAX)


def select_layers(target_layers: str, count: int) -> frozenset[int]:
    """The numbers of the layers that a choice stands for.

    Example:
        >>> sorted(select_layers("0, -2:", 30)), sorted(select_layers("top-third", 6))
        ([0, 28, 29], [4, 5])

    Args:
        target_layers: numbers, slices (as Python has them) and names, separated by commas. Negative numbers count from
            the end.
        count: layers of the model.

    Raises:
        ConfigError: the choice is not written as one, names a layer that is not there, or selects none.
    """
    check_layers(target_layers)
    chosen: set[int] = set()
    for part in target_layers.split(","):
        chosen |= _of_part(part.strip(), count)
    if not chosen or any(number not in range(count) for number in chosen):
        raise ConfigError(
            f"target_layers={target_layers!r}: the model has {count} layers, 0 to {count - 1}; "
            f"{'a number is not among them' if chosen else 'this selects none of them'}. Expected {SYNTAX}."
        )
    return frozenset(chosen)


def _of_part(part: str, count: int) -> set[int]:
    if part in NAMED:
        divisor = NAMED[part]
        return set(range(count - (count // divisor if divisor else 0), count)) or {count - 1}
    if ":" in part:
        start, stop = (int(end) if end else None for end in part.split(":"))
        return set(range(count)[start:stop])
    number = int(part)
    return {number + count if number < 0 else number}
