"""What an estimator is: it chooses the states to score, and estimates the gradient from their losses.

probes         keys of K directions -> the probes that the engine scores
coefficients   losses of the probes -> one number per direction; the estimate is sum_k coefficient_k Z_k
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_zo.methods.plan import Probe, ProbePlan
from vllm_zo.options import check_options
from vllm_zo.validation import check_int


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """An estimator is frozen and picklable and has no state."""

    name: ClassVar[str]
    min_queries: ClassVar[int] = 1
    """The fewest directions with which the estimate is defined."""
    gives_slopes: ClassVar[bool] = True
    """Whether K times a coefficient is the slope of the loss along its direction."""

    def __post_init__(self) -> None:
        check_options(self, f"{self.name}.")

    def check_queries(self, method: str, queries: int) -> None:
        fix = f"{self.name} compares the directions of a step with each other"
        check_int(f"{method}.queries", queries, self.min_queries, fix=fix if self.min_queries > 1 else "")

    @abstractmethod
    def probes(self, keys: Sequence[int], eps: float) -> tuple[Probe, ...]:
        """The probes of the directions with these keys, at radius `eps` in weight units. Probes of one direction are
        adjacent."""

    @abstractmethod
    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        """(P, E) float32 losses in nats, in the order of `plan.probes` -> (K,) float32, on the same device.

        An implementation takes eps from the plan, not from the method: an eps schedule may have scaled it. It must not
        copy a loss to the host, which would make the step wait for the GPU.
        """


def projected_grad(loss_plus: Tensor, loss_minus: Tensor, eps: float) -> Tensor:
    """The slope of the loss along each probed direction (central difference).

        c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)

    Args:
        loss_plus: (K,) float32, mean nats, one per direction.
        loss_minus: (K,) float32, same order and same batch as `loss_plus`.
        eps: perturbation radius in weight units, > 0.

    Returns:
        (K,) float32, nats per unit of weight. Losses that are not finite pass through; the caller skips the update.

    Source: SPSA, Spall 1992; MeZO, arXiv:2305.17333, Algorithm 1.
    """
    return (loss_plus - loss_minus) / (2.0 * eps)


def pairs(keys: Sequence[int], eps: float) -> tuple[Probe, ...]:
    """(+d0, -d0, +d1, -d1, ...)."""
    return tuple(Probe(key=key, sign=sign, eps=eps) for key in keys for sign in (1, -1))


def centre_and_steps(keys: Sequence[int], eps: float) -> tuple[Probe, ...]:
    """(centre, +d0, +d1, ...)."""
    return (Probe(key=0, sign=0, eps=eps), *(Probe(key=key, sign=1, eps=eps) for key in keys))
