"""FZOO: one-sided probes along random signs. The standard deviation of their losses divides the step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_zo.methods.base import LowRankMethod
from vllm_zo.methods.coordinates import Coordinates, LeftFactor
from vllm_zo.methods.estimators import Estimator, StdNormalised


@dataclass(frozen=True, kw_only=True)
class FZOO(LowRankMethod):
    """A step takes K + 1 forward passes, all in one batch.

        g = 1/(eps K) sum_k (l_k - l_0) Z_k;   W <- W - lr * g / std(l_1..l_K)

    Two things differ from the paper. Its directions are dense matrices of random signs; ours are low-rank,
    `Z_k = U_k V^T` with random signs in U_k and V. (At rank 1 the entries of Z_k are random signs again, but not
    independent ones.) And V stays for an interval, as in LoZO.

    Source: FZOO: Fast Zeroth-Order Optimizer, arXiv:2506.09034, Algorithm 1 (N = 8).
    """

    name = "fzoo"

    rank: int = 1
    queries: int = 8
    estimator: Estimator = field(default_factory=StdNormalised)

    @property
    def coordinates(self) -> Coordinates:
        return LeftFactor(self.rank, u="rademacher", v="rademacher")
