"""The update rules. A new one needs a file here, a line in OPTIMIZERS, and a line in the table of
tests/test_methods.py."""

from vllm_zo.methods.optimizers.adam import Adam
from vllm_zo.methods.optimizers.base import Estimate, Optimizer, State
from vllm_zo.methods.optimizers.meazo import MEAZO
from vllm_zo.methods.optimizers.muon import Muon
from vllm_zo.methods.optimizers.sgd import SGD, Momentum
from vllm_zo.methods.optimizers.sign import Sign
from vllm_zo.registry import Registry, dataclass_of

OPTIMIZERS: Registry[type[Optimizer]] = Registry(
    "optimizer",
    dataclass_of(Optimizer),
    "a dataclass that derives from vllm_zo.methods.Optimizer",
    (SGD, Momentum, Adam, MEAZO, Sign, Muon),
)

__all__ = [
    "MEAZO",
    "OPTIMIZERS",
    "SGD",
    "Adam",
    "Estimate",
    "Momentum",
    "Muon",
    "Optimizer",
    "Sign",
    "State",
]
