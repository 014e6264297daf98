"""Adam on the trained numbers, with float32 moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_zo.methods.optimizers.base import Estimate, Optimizer, State, beta_option
from vllm_zo.options import option


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam on the trained numbers. Its two moments take twice the memory of the numbers of one basis.

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        theta <- theta - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + adam_eps)

    It is not Adam on the dense weights, whose second moment is no low-rank matrix. After a refresh of V it projects the
    first moment on the new V. It keeps the second moment, because the expected squared gradient of an entry of U does
    not depend on which V the method drew. With `weight_decay` it is AdamW.

    Source: Kingma and Ba, arXiv:1412.6980; ZO-AdaMM, arXiv:1910.06513.
    """

    name = "adam"
    scale_free = True

    beta1: float = beta_option(0.9, "Decay of the first moment.")
    beta2: float = beta_option(0.999, "Decay of the second moment.")
    adam_eps: float = option(1e-8, above=0, help="Added to the root of the second moment.")

    def init(self, theta_N: Tensor) -> State:
        # A tensor, because `AdapterState.apply` takes the step back with `where` if a loss was not finite.
        steps = torch.zeros((), dtype=torch.float64, device=theta_N.device)
        return {"m": torch.zeros_like(theta_N), "v": torch.zeros_like(theta_N), "steps": steps}

    def update(self, theta_N: Tensor, estimate: Estimate, state: State, learning_rate: float) -> tuple[Tensor, State]:
        g_N, steps = estimate.gradient(), state["steps"] + 1
        m_N = state["m"] * self.beta1 + g_N * (1 - self.beta1)
        v_N = state["v"] * self.beta2 + g_N.square() * (1 - self.beta2)
        # In float64: 1 - 0.999^t cancels at the first steps, where float32 would keep four digits.
        m_hat = m_N / (1 - self.beta1**steps).float()
        v_hat = v_N / (1 - self.beta2**steps).float()
        step_N = m_hat / (v_hat.sqrt() + self.adam_eps)
        return theta_N - step_N * learning_rate, {"m": m_N, "v": v_N, "steps": steps}

    def refresh(self, state: State, transfer: Callable[[Tensor], Tensor]) -> State:
        return {**state, "m": transfer(state["m"])}
