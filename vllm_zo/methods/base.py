"""What a zeroth-order method is. Pure torch: nothing here knows vLLM, slots or requests.

A method answers four questions about a step:

    plan          which nearby parameter states to score (directions x signs)
    directions    the low-rank direction of one seed, for one module
    coefficients  losses of the probes -> one number per direction
    update        (accumulator, directions, coefficients, learning rate) -> new accumulator

Notation (shape suffixes in dense code): O out features, I in features, R rank, K directions, P probes, E examples.
A direction of a linear module is `Z = scale * U V^T`, with `u_OR` fresh per seed and `v_IR` drawn once per *basis*.
A probe scores the loss at `W + acc + sign * eps * Z`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModuleShape:
    """One linear weight in Hugging Face (unfused) coordinates: q_proj, k_proj and v_proj are three modules."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Probe:
    """One parameter state to score. `seed` derives the direction: equal seeds, equal direction."""

    seed: int
    sign: int  # +1, -1, or 0 for the centre
    eps: float


@dataclass(frozen=True)
class ProbePlan:
    """The probes of one estimate. Probes of one direction are adjacent: (+d0, -d0, +d1, -d1, ...)."""

    step: int
    probes: tuple[Probe, ...]
    basis: int
    """Index of the right factor V. A change means: refresh V (and fold, in `fold` space) before this step."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Distinct direction seeds, in order of first appearance; the centre has none."""
        return tuple(dict.fromkeys(p.seed for p in self.probes if p.sign))


@runtime_checkable
class Method(Protocol):
    """An estimator and its update rule. Implementations are frozen dataclasses, picklable, without state."""

    @property
    def name(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def update_spaces(self) -> tuple[str, ...]:
        """Update spaces the method can run in, default first."""
        ...

    def validate(self) -> None:
        """Raise ConfigError naming field, value and fix when a hyperparameter is out of range."""

    def epoch(self, step: int) -> int:
        """How many times V has been refreshed before `step` (0 at the start)."""
        ...

    def plan(self, job_seed: int, step: int, basis: int) -> ProbePlan: ...

    def scale(self) -> float:
        """Factor of `U V^T` in a direction."""
        ...

    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        """(P, E) float32 losses in nats -> (K,) float32 weights of the directions in the gradient estimate."""
        ...

    def update(self, acc: Tensor, u_KN: Tensor, coefficients_K: Tensor, learning_rate: float) -> Tensor:
        """New accumulator of one basis. `acc` (N,) and `u_KN` are flat over all modules' U entries, float32."""
        ...


def projected_grad(loss_plus: Tensor, loss_minus: Tensor, eps: float) -> Tensor:
    """Slope of the loss along each probed direction (central difference).

        c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)

    Args:
        loss_plus: (K,) float32, mean nats, one per direction.
        loss_minus: (K,) float32, same order and same batch as `loss_plus`.
        eps: perturbation radius in weight units, > 0.

    Returns:
        (K,) float32, nats per unit of weight. Non-finite losses pass through; the caller skips the update.

    Source: SPSA, Spall 1992; MeZO, arXiv:2305.17333, Algorithm 1.
    """
    return (loss_plus - loss_minus) / (2.0 * eps)


def sgd(acc: Tensor, u_KN: Tensor, coefficients_K: Tensor, step_size: float) -> Tensor:
    """`acc - step_size * sum_k coefficients_k u_k`, out of place, in float32 and in a fixed order of K.

    The order is fixed (a loop, not a matmul) so that replaying the log gives the same bits for any thread count.
    """
    for coefficient, u_N in zip(coefficients_K.unbind(), u_KN.unbind(), strict=True):
        acc = torch.addcmul(acc, u_N, coefficient.expand_as(u_N), value=-step_size)
    return acc
