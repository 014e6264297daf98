"""The zeroth-order methods. A new one: a file here, a line in METHODS, a line in the table of tests/test_methods.py."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vllm_zo.methods.base import Method
from vllm_zo.methods.factorized_mezo import FactorizedMeZO
from vllm_zo.methods.lozo import LoZO
from vllm_zo.validation import check_keys, check_known

METHODS: dict[str, type[Any]] = {
    LoZO.name: LoZO,
    FactorizedMeZO.name: FactorizedMeZO,
}


def build_method(name: str, **hyperparameters: Any) -> Method:
    """The method called `name`.

    Example:
        >>> build_method("lozo", rank=4).rank
        4

    Raises:
        ConfigError: unknown method or hyperparameter (with the nearest known name), or a value out of range.
    """
    check_known("method", name, METHODS)
    method = METHODS[name]
    check_keys(f"hyperparameter of {name}", hyperparameters, [f.name for f in fields(method)])
    built: Method = method(**hyperparameters)
    return built


__all__ = ["METHODS", "FactorizedMeZO", "LoZO", "Method", "build_method"]
