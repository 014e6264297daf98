"""The estimators. A new one needs a file here, a line in ESTIMATORS, and a line in the table of
tests/test_methods.py."""

from vllm_zo.methods.estimators.base import Estimator
from vllm_zo.methods.estimators.fzoo import StdNormalised
from vllm_zo.methods.estimators.kerzoo import Kernel
from vllm_zo.methods.estimators.one_sided import OneSided
from vllm_zo.methods.estimators.rloo import LeaveOneOut
from vllm_zo.methods.estimators.two_sided import TwoSided
from vllm_zo.methods.estimators.z_score import ZScore
from vllm_zo.registry import Registry, dataclass_of

ESTIMATORS: Registry[type[Estimator]] = Registry(
    "estimator",
    dataclass_of(Estimator),
    "a dataclass that derives from vllm_zo.methods.Estimator",
    (TwoSided, OneSided, LeaveOneOut, StdNormalised, Kernel, ZScore),
)

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "Kernel",
    "LeaveOneOut",
    "OneSided",
    "StdNormalised",
    "TwoSided",
    "ZScore",
]
