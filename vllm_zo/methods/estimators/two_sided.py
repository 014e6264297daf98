"""Two-sided differences, averaged: n-SPSA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_zo.methods.estimators.base import Estimator, pairs, projected_grad
from vllm_zo.methods.plan import Probe, ProbePlan


@dataclass(frozen=True, kw_only=True)
class TwoSided(Estimator):
    """`1/K sum_k c_k Z_k` with `c_k = (L(W + eps Z_k) - L(W - eps Z_k)) / (2 eps)`, from 2K forward passes.

    At a fixed budget of forward passes, plain averaging over K is not query-efficient (arXiv:2509.15552). More queries
    pay where they run in one batch, or where the step is already as long as one direction allows.

    Source: n-SPSA, MeZO, arXiv:2305.17333, Definition 1; Spall 1992.
    """

    name = "two-sided"

    def probes(self, keys: Sequence[int], eps: float) -> tuple[Probe, ...]:
        return pairs(keys, eps)

    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        mean_P = losses_PE.mean(dim=1)
        # Every second probe: `pairs` puts + and - of a direction next to each other.
        plus_K, minus_K = mean_P[0::2], mean_P[1::2]
        return projected_grad(plus_K, minus_K, plan.probes[0].eps) / len(plus_K)
