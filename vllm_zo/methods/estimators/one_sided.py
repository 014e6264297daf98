"""One-sided differences against the unperturbed state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_zo.methods.estimators.base import Estimator, centre_and_steps
from vllm_zo.methods.plan import Probe, ProbePlan


@dataclass(frozen=True, kw_only=True)
class OneSided(Estimator):
    """`1/K sum_k (L(W + eps Z_k) - L(W)) / eps * Z_k`, from K + 1 forward passes.

    For large K that is about half the passes of `TwoSided`. The error is of order eps instead of eps^2.

    Source: Duchi et al., arXiv:1312.2139, Equation 4; the estimate inside FZOO, arXiv:2506.09034.
    """

    name = "one-sided"

    def probes(self, keys: Sequence[int], eps: float) -> tuple[Probe, ...]:
        return centre_and_steps(keys, eps)

    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        mean_P = losses_PE.mean(dim=1)
        return (mean_P[1:] - mean_P[0]) / (plan.probes[0].eps * (len(mean_P) - 1))
