"""One-sided probes, each compared with the mean of the others: no centre, no pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_zo.methods.estimators.base import Estimator
from vllm_zo.methods.plan import Probe, ProbePlan


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(Estimator):
    """`1/K sum_k (L_k - mean_{j != k} L_j) / eps * Z_k` with `L_k = L(W + eps Z_k)`: K passes, K - 1 differences.

    The code computes `1/(K-1) sum_k (L_k - mean L) / eps * Z_k`, which is the same.

    Source: REINFORCE leave-one-out, Kool et al. 2019, used as a zeroth-order estimate.
    """

    name = "rloo"
    min_queries = 2

    def probes(self, keys: Sequence[int], eps: float) -> tuple[Probe, ...]:
        return tuple(Probe(key=key, sign=1, eps=eps) for key in keys)

    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        mean_P = losses_PE.mean(dim=1)
        return (mean_P - mean_P.mean()) / (plan.probes[0].eps * (len(mean_P) - 1))
