"""LoZO: low-rank zeroth-order SGD whose right factor is kept for an interval."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vllm_zo.methods.antithetic import antithetic_plan, check_hyperparameters, mean_projected_grads
from vllm_zo.methods.base import ProbePlan, sgd
from vllm_zo.validation import check_int


@dataclass(frozen=True, kw_only=True)
class LoZO:
    """Low-rank ZO-SGD with lazy sampling of V.

        step t:  V drawn if t % interval == 0, else kept;  U_k fresh, k = 1..K;  entries N(0, 1)
                 c_k = (L(W + eps U_k V^T) - L(W - eps U_k V^T)) / (2 eps)
                 W  <- W - lr * 1/K sum_k c_k U_k V^T

    V is shared inside an interval, so the update stays in a small accumulator, `U_acc <- U_acc - lr/K sum_k c_k U_k`.

    Where this differs:
        - from the official code (optsuite/LOZO, `LOZOtrainer.py`): there, on a refresh step, the probe draws V and U
          after seeding, but the update seeds again and draws U alone: it moves along a direction that was never probed
          (with interval 1: at every step). Here the direction applied is the direction probed, always.
        - from the paper's estimator, which divides by the rank: like the official code we do not, so that published
          learning rates mean the same here.
        - queries > 1 is the plain average over K directions, all with the step's V (the paper has K = 1).

    Example:
        >>> LoZO(rank=2, interval=50).epoch(120)
        2

    Source: Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures, arXiv:2410.07698.
    """

    name = "lozo"
    update_spaces = ("bank", "fold")

    rank: int = 2
    """Rank of a direction."""
    interval: int = 50
    """Steps for which V is kept (nu in the paper)."""
    eps: float = 1e-3
    """Probe radius in weight units."""
    queries: int = 1
    """Directions per step (K), averaged; all are scored in one perturbation group."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        check_hyperparameters(self.name, self.rank, self.eps, self.queries)
        check_int(f"{self.name}.interval", self.interval, 1, fix="the paper uses 50 to 500")

    def epoch(self, step: int) -> int:
        return step // self.interval

    def plan(self, job_seed: int, step: int, basis: int) -> ProbePlan:
        return antithetic_plan(job_seed, step, basis, self.eps, self.queries)

    def scale(self) -> float:
        return 1.0

    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        return mean_projected_grads(losses_PE, self.eps)

    def update(self, acc: Tensor, u_KN: Tensor, coefficients_K: Tensor, learning_rate: float) -> Tensor:
        return sgd(acc, u_KN, coefficients_K, learning_rate * self.scale())
