"""The zeroth-order methods. A new one needs a file here, a line in METHODS, and a line in the table of
tests/test_methods.py.

Another package declares its method in the entry point group "vllm_zo.methods"; a script calls `METHODS.register`
(docs/adding-a-method.md).
"""

from __future__ import annotations

from vllm_zo.methods.base import LowRankMethod, Method
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
from vllm_zo.methods.optimizers import MEAZO, OPTIMIZERS, SGD, Adam, Momentum, Muon, Optimizer, Sign
from vllm_zo.methods.subzero import SubZero
from vllm_zo.methods.tezo import TeZO
from vllm_zo.methods.zo_muon import ZOMuon
from vllm_zo.registry import Registry, dataclass_of

METHODS: Registry[type[Method]] = Registry(
    "method",
    dataclass_of(Method),
    "a dataclass that derives from vllm_zo.methods.Method",
    (LoZO, FactorizedMeZO, FZOO, KerZOO, EGGROLL, TeZO, SubZero, ZOMuon, LoRAFA, MeZOLoRA, MeZO),
)
"""`METHODS.build("lozo", rank=4, optimizer="adam")` builds a method. Estimator and optimizer may be names or
{"name": ..., settings}."""

__all__ = [
    "EGGROLL",
    "ESTIMATORS",
    "FZOO",
    "MEAZO",
    "METHODS",
    "OPTIMIZERS",
    "SGD",
    "Adam",
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
]
