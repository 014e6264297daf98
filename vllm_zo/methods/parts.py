"""Parts of a method by name: what stands in JSON and on a command line -> an estimator or an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vllm_zo.validation import check_keys, check_known, reject


def build_part(what: str, value: object, known: Mapping[str, type[Any]]) -> Any:
    """`value` if it is a part already; else the one it names: "adam", or {"name": "adam", "beta1": 0.8}.

    Raises:
        ConfigError: unknown name or setting (with the nearest known one), or another type.
    """
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping):
        settings = dict(value)
        name = settings.pop("name", None)
        check_known(what, name, known)
        check_keys(f"setting of {what} {name}", settings, [f.name for f in fields(known[str(name)])])
        value = known[str(name)](**settings)
    if type(value) not in known.values():
        reject(what, value, f"one of {', '.join(known)}, or {{'name': ..., settings}}")
    return value
