"""MEAZO: one adaptive step size for all weights, from the second moment of the projected gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_zo.methods.optimizers.base import Estimate, Optimizer, State, beta_option
from vllm_zo.options import option


@dataclass(frozen=True, kw_only=True)
class MEAZO(Optimizer):
    """An adaptive step size with one second moment v for all weights.

        v <- b v + (1 - b) c^2;  theta <- theta - lr / (sqrt(v / (1 - b^t)) + zeta) * mean_k c_k Z_k

    With K directions c^2 is the mean of the squared projected gradients c_k = K w_k, where w_k are the coefficients of
    the estimate.

    Source: MEAZO, arXiv:2605.03869.
    """

    name = "meazo"
    scale_free = True

    beta: float = beta_option(0.99, "Decay of the second moment (b).")
    zeta: float = option(1e-8, above=0, help="Added to the root of the second moment.")

    def init(self, theta_N: Tensor) -> State:
        return {name: torch.zeros((), dtype=torch.float64, device=theta_N.device) for name in ("v", "steps")}

    def update(self, theta_N: Tensor, estimate: Estimate, state: State, learning_rate: float) -> tuple[Tensor, State]:
        # float64, as Adam's counter: 1 - b^t cancels at the first steps.
        w_K, steps = estimate.coefficients_K.double(), state["steps"] + 1
        v = state["v"] * self.beta + (w_K * len(w_K)).square().mean() * (1 - self.beta)
        root = (v / (1 - self.beta**steps)).sqrt() + self.zeta
        # The root divides the K coefficients instead of the N numbers, so that no estimate is formed.
        adapted = replace(estimate, coefficients_K=(w_K / root).float())
        return adapted.descend(theta_N, learning_rate), {"v": v, "steps": steps}
