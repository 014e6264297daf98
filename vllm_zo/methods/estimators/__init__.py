"""The estimators. A new one: a file here, a line in ESTIMATORS, a line in the table of tests/test_methods.py."""

from vllm_zo.methods.estimators.base import Estimator
from vllm_zo.methods.estimators.fzoo import StdNormalised
from vllm_zo.methods.estimators.kernel import Kernel
from vllm_zo.methods.estimators.one_sided import OneSided
from vllm_zo.methods.estimators.rloo import LeaveOneOut
from vllm_zo.methods.estimators.two_sided import TwoSided
from vllm_zo.methods.estimators.z_score import ZScore

ESTIMATORS: dict[str, type[Estimator]] = {
    estimator.name: estimator for estimator in (TwoSided, OneSided, LeaveOneOut, StdNormalised, Kernel, ZScore)
}

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
