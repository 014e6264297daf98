"""EGGROLL: evolution strategies whose members differ from the mean by low-rank matrices (rank 1 by default)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vllm_zo.methods.base import MAX_RANK, LowRankMethod
from vllm_zo.methods.coordinates import Coordinates, Population
from vllm_zo.methods.estimators import Estimator, ZScore
from vllm_zo.validation import check_int


@dataclass(frozen=True, kw_only=True)
class EGGROLL(LowRankMethod):
    """A step scores N = 2K members `W + sigma E_i` in antithetic pairs. Each pair has factors of its own.

        E_i = A_i B_i^T / sqrt(r),  entries of A_i (out x r) and B_i (in x r) N(0, 1)
        W  <- W + lr * sqrt(N) * 1/N sum_i F_i sigma E_i,   F_i: the fitness (minus the loss), z-scored

    `eps` is sigma, and `queries` is K. The factors B_i of all pairs are the columns of one V, so all members of a
    population share one adapter A. Each direction moves its own columns of U. The update of a step has rank K r.

    Two things differ from the paper. The factors B_i stay for `interval` steps; the paper's interval of 1 needs `fold`
    space, because a bank would need a basis for each step. And all members score the same mini-batch.

    Source: Evolution Strategies at the Hyperscale, arXiv:2511.16652.
    """

    name = "eggroll"
    update_spaces = ("fold", "bank")

    rank: int = 1
    interval: int = 1
    queries: int = 4
    estimator: Estimator = field(default_factory=ZScore)

    def validate(self) -> None:
        super().validate()
        at_most = MAX_RANK // self.rank
        check_int(f"{self.name}.queries", self.queries, 1, at_most, "every pair has rank columns of its own")

    @property
    def coordinates(self) -> Coordinates:
        # The rank of the adapter, with columns for every pair; `scale` is the 1 / sqrt(r) of one member.
        rank = self.queries * self.rank
        return Population(rank, scale=1.0 / math.sqrt(self.rank), member_rank=self.rank)
