"""The update rules. A new one: a file here, a line in OPTIMIZERS, a line in the table of tests/test_optimizers.py."""

from vllm_zo.methods.optimizers.adam import Adam
from vllm_zo.methods.optimizers.base import Estimate, Optimizer, State
from vllm_zo.methods.optimizers.conserve import Conserve
from vllm_zo.methods.optimizers.meazo import MEAZO
from vllm_zo.methods.optimizers.muon import Muon
from vllm_zo.methods.optimizers.sgd import SGD, Momentum
from vllm_zo.methods.optimizers.sign import Sign

OPTIMIZERS: dict[str, type[Optimizer]] = {
    optimizer.name: optimizer for optimizer in (SGD, Momentum, Adam, MEAZO, Sign, Muon, Conserve)
}

__all__ = [
    "MEAZO",
    "OPTIMIZERS",
    "SGD",
    "Adam",
    "Conserve",
    "Estimate",
    "Momentum",
    "Muon",
    "Optimizer",
    "Sign",
    "State",
]
