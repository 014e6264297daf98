"""The zeroth-order methods. A new one: a file here, a line in METHODS, a line in the table of tests/test_methods.py.

A method of another package is declared in its entry point group "vllm_zo.methods" (docs/adding-a-method.md).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.methods.base import LowRankMethod, Method, method_fields
from vllm_zo.methods.eggroll import EGGROLL
from vllm_zo.methods.estimators import (
    ESTIMATORS,
    Estimator,
    Kernel,
    LeaveOneOut,
    OneSided,
    StdNormalised,
    TwoSided,
    ZScore,
)
from vllm_zo.methods.factorized_mezo import FactorizedMeZO
from vllm_zo.methods.fzoo import FZOO
from vllm_zo.methods.kerzoo import KerZOO
from vllm_zo.methods.lora_fa import LoRAFA
from vllm_zo.methods.lozo import LoZO
from vllm_zo.methods.mezo import MeZO
from vllm_zo.methods.mezo_lora import MeZOLoRA
from vllm_zo.methods.optimizers import MEAZO, OPTIMIZERS, SGD, Adam, Conserve, Momentum, Muon, Optimizer, Sign
from vllm_zo.methods.subzero import SubZero
from vllm_zo.methods.tezo import TeZO
from vllm_zo.methods.zo_muon import ZOMuon
from vllm_zo.validation import check_keys, check_known

ENTRY_POINT_GROUP = "vllm_zo.methods"

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        LoZO,
        FactorizedMeZO,
        FZOO,
        KerZOO,
        EGGROLL,
        TeZO,
        SubZero,
        ZOMuon,
        LoRAFA,
        MeZOLoRA,
        MeZO,
    )
}
"""Those of this package by name."""


def known_methods() -> Mapping[str, type[Method]]:
    """METHODS and the methods of installed packages, by name. Their packages are imported at the first call.

    Raises:
        ConfigError: an entry point is no Method, or takes a name that is in use.
    """
    known = dict(METHODS)
    for where, method in _declared():
        if known.setdefault(method.name, method) is not method:
            raise ConfigError(f"{where}: the name {method.name!r} is taken by {known[method.name].__qualname__}.")
    return known


@functools.cache
def _declared() -> tuple[tuple[str, type[Method]], ...]:
    """Methods of other packages, with where each is declared."""
    found = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        method = point.load()
        where = f"entry point {point.name!r} ({point.value}) of group {ENTRY_POINT_GROUP!r}"
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise ConfigError(f"{where}: expected a subclass of vllm_zo.methods.Method, got {method!r}.")
        found.append((where, method))
    return tuple(found)


def build_method(name: str, **hyperparameters: Any) -> Method:
    """The method called `name`; `estimator` and `optimizer` by name or as {"name": ..., settings}.

    Example:
        >>> build_method("lozo", rank=4, optimizer="adam").optimizer.beta1
        0.9

    Raises:
        ConfigError: unknown method or hyperparameter (with the nearest known name), or a value out of range.
    """
    known = known_methods()
    check_known("method", name, known)
    method = known[name]
    check_keys(f"hyperparameter of {name}", hyperparameters, [f.name for f in fields(method)])
    return method(**hyperparameters)


__all__ = [
    "EGGROLL",
    "ESTIMATORS",
    "FZOO",
    "MEAZO",
    "METHODS",
    "OPTIMIZERS",
    "SGD",
    "Adam",
    "Conserve",
    "Estimator",
    "FactorizedMeZO",
    "KerZOO",
    "Kernel",
    "LeaveOneOut",
    "LoRAFA",
    "LoZO",
    "LowRankMethod",
    "MeZO",
    "MeZOLoRA",
    "Method",
    "Momentum",
    "Muon",
    "OneSided",
    "Optimizer",
    "Sign",
    "StdNormalised",
    "SubZero",
    "TeZO",
    "TwoSided",
    "ZOMuon",
    "ZScore",
    "build_method",
    "known_methods",
    "method_fields",
]
