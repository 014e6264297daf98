"""Factorised high-rank MeZO: a product of two Gaussian factors in place of MeZO's dense Gaussian direction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vllm_zo.methods.base import Method, rank_option
from vllm_zo.methods.coordinates import Coordinates, LeftFactor


@dataclass(frozen=True, kw_only=True)
class FactorizedMeZO(Method):
    """MeZO along products of two factors. Their entries have variance 1 and become Gaussian as the rank grows.

        Z_k = U_k V^T / sqrt(r),  U_k and V fresh every step;   W <- W - lr * 1/K sum_k c_k Z_k

    V changes at every step, so the worker folds the update into W at every step. The method runs in `fold` space only,
    because a bank would need a basis for each step. With queries > 1 the K directions of a step share its V and differ
    in U only, so their average explores less than K independent directions would.

    Source: LLM Zeroth-Order Fine-Tuning is an Inference Workload, arXiv:2605.28760 (r = 128 to 512); MeZO,
    arXiv:2305.17333.
    """

    name = "factorized-mezo"
    update_spaces = ("fold",)
    refusals: ClassVar[Mapping[str, str]] = {"bank": "V is fresh at every step: there is nothing to accumulate in"}

    rank: int = rank_option(128)
    """Rank of a direction; its entries have variance 1 for every rank."""

    @property
    def coordinates(self) -> Coordinates:
        # An entry of U V^T sums r products of variance 1: without the scale its variance would be r, and eps would
        # mean another distance at every rank.
        return LeftFactor(self.rank, scale=1.0 / math.sqrt(self.rank), folds_every_step=True)

    def epoch(self, step: int) -> int:
        return step
