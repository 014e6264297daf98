"""ZO-Muon: the estimate inside a fixed orthonormal subspace, orthogonalised."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_zo.methods.base import LowRankMethod
from vllm_zo.methods.coordinates import Coordinates, LeftFactor
from vllm_zo.methods.optimizers import Muon, Optimizer


@dataclass(frozen=True, kw_only=True)
class ZOMuon(LowRankMethod):
    """`g = 1/K sum_k c_k U_k` in the subspace of an orthonormal V, kept for `interval`;  W <- W - lr * msign(g) V^T.

    Where this differs from the paper: the rank is 8 by default to fit the default slot (the paper has 64); the subspace
    is on the input side of every weight; the estimate is two-sided.

    Source: ZO-Muon, arXiv:2602.17155.
    """

    name = "zo-muon"

    rank: int = 8
    interval: int = 100
    queries: int = 4
    optimizer: Optimizer = field(default_factory=Muon)

    @property
    def coordinates(self) -> Coordinates:
        return LeftFactor(self.rank, v="orthonormal")
