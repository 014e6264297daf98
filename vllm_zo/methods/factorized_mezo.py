"""Factorised high-rank MeZO: a product of two Gaussian factors in place of MeZO's dense Gaussian direction."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vllm_zo.methods.antithetic import antithetic_plan, check_hyperparameters, mean_projected_grads
from vllm_zo.methods.base import ProbePlan, sgd


@dataclass(frozen=True, kw_only=True)
class FactorizedMeZO:
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

    rank: int = 128
    """Rank of a direction."""
    eps: float = 1e-3
    """Probe radius in weight units; a direction's entries have variance 1 for every rank."""
    queries: int = 1
    """Directions per step (K), averaged; all are scored in one perturbation group and share V."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        check_hyperparameters(self.name, self.rank, self.eps, self.queries)

    def epoch(self, step: int) -> int:
        return step

    def plan(self, job_seed: int, step: int, basis: int) -> ProbePlan:
        return antithetic_plan(job_seed, step, basis, self.eps, self.queries)

    def scale(self) -> float:
        return 1.0 / math.sqrt(self.rank)

    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        return mean_projected_grads(losses_PE, self.eps)

    def update(self, acc: Tensor, u_KN: Tensor, coefficients_K: Tensor, learning_rate: float) -> Tensor:
        return sgd(acc, u_KN, coefficients_K, learning_rate * self.scale())
