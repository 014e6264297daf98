"""ZO-Muon: it orthogonalises an estimate inside a fixed orthonormal subspace."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_zo.methods.base import LowRankMethod
from vllm_zo.methods.coordinates import Coordinates, LeftFactor
from vllm_zo.methods.optimizers import Muon, Optimizer


@dataclass(frozen=True, kw_only=True)
class ZOMuon(LowRankMethod):
    """`g = 1/K sum_k c_k U_k` and `W <- W - lr * msign(g) V^T`. V is orthonormal and stays for `interval` steps.

    Three things differ from the paper. The default rank is 8, which fits an engine's default slot rank of 16 (the paper
    has 64). The subspace is on the input side of every weight. The estimate is two-sided.

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
