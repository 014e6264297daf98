"""Factorised high-rank MeZO: a product of two Gaussian factors in place of MeZO's dense Gaussian direction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vllm_zo.methods.base import MAX_RANK, Method
from vllm_zo.methods.coordinates import Coordinates, LeftFactor
from vllm_zo.validation import check_int


@dataclass(frozen=True, kw_only=True)
class FactorizedMeZO(Method):
    """MeZO with directions of unit-variance entries that become Gaussian as the rank grows.

        Z_k = U_k V^T / sqrt(r),  U_k and V fresh every step;   W <- W - lr * 1/K sum_k c_k Z_k

    V changes at every step, so the update is folded into W at every step: `fold` space only (a bank would need a basis
    a step). With queries > 1 the K directions of a step share that step's V and differ in U only: their average
    explores less than K independent directions would.

    Source: LLM Zeroth-Order Fine-Tuning is an Inference Workload, arXiv:2605.28760 (r = 128 to 512); MeZO,
    arXiv:2305.17333.
    """

    name = "factorized-mezo"
    update_spaces = ("fold",)
    refusals: ClassVar[Mapping[str, str]] = {"bank": "V is fresh at every step: there is nothing to accumulate in"}

    rank: int = 128
    """Rank of a direction; its entries have variance 1 for every rank."""

    def validate(self) -> None:
        check_int(f"{self.name}.rank", self.rank, 1, MAX_RANK, "vLLM's adapters go no further")
        super().validate()

    @property
    def coordinates(self) -> Coordinates:
        return LeftFactor(self.rank, scale=1.0 / math.sqrt(self.rank), folds_every_step=True)

    def epoch(self, step: int) -> int:
        return step
