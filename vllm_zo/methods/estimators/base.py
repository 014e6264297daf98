"""What an estimator is: which states to score around the current one, and what their losses say of the gradient.

probes         seeds of K directions -> the probes that are scored
coefficients   losses of the probes -> one number per direction; the estimate is sum_k coefficient_k Z_k
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_zo.methods.probe import Probe, ProbePlan
from vllm_zo.validation import check_int


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """Frozen, picklable, without state."""

    name: ClassVar[str]
    min_queries: ClassVar[int] = 1
    """Fewest directions with which it makes sense."""

    def validate(self) -> None:  # noqa: B027 - most have no settings
        """Raise ConfigError when a setting is out of range."""

    def check_queries(self, method: str, queries: int) -> None:
        fix = f"{self.name} compares the directions of a step with each other"
        check_int(f"{method}.queries", queries, self.min_queries, fix=fix if self.min_queries > 1 else "")

    @abstractmethod
    def probes(self, seeds: Sequence[int], eps: float) -> tuple[Probe, ...]:
        """Probes of the directions with these seeds; those of one direction are adjacent."""

    @abstractmethod
    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        """(P, E) float32 losses in nats, rows as `probes` made them -> (K,) float32, on the same device."""


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


def pairs(seeds: Sequence[int], eps: float) -> tuple[Probe, ...]:
    """(+d0, -d0, +d1, -d1, ...)."""
    return tuple(Probe(seed=seed, sign=sign, eps=eps) for seed in seeds for sign in (1, -1))


def centre_and_steps(seeds: Sequence[int], eps: float) -> tuple[Probe, ...]:
    """(centre, +d0, +d1, ...)."""
    return (Probe(seed=0, sign=0, eps=eps), *(Probe(seed=seed, sign=1, eps=eps) for seed in seeds))
