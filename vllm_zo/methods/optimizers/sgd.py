"""Plain descent along the estimate, with or without momentum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_zo.methods.optimizers.base import Estimate, Optimizer, State, beta_option


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """`theta <- theta - lr * g`. No state.

    Source: ZO-SGD, MeZO, arXiv:2305.17333, Definition 2.
    """

    name = "sgd"

    def update(self, theta_N: Tensor, estimate: Estimate, state: State, learning_rate: float) -> tuple[Tensor, State]:
        return estimate.descend(theta_N, learning_rate), state


@dataclass(frozen=True, kw_only=True)
class Momentum(Optimizer):
    """`M <- b M + (1 - b) g;  theta <- theta - lr * M`. With LoZO this is LOZO-M.

    After a refresh of V it first projects M on the new V: `M <- b M (V_old^T V_new)/I + (1 - b) g`, as in the paper.
    Other coordinates have other projections (`Coordinates.transfer`).

    Source: LOZO-M, arXiv:2410.07698, Section 4.3 (b = 0.9; the official code's argument defaults to 0.7).
    """

    name = "momentum"

    beta: float = beta_option(0.9, "Decay of the momentum (b).")

    def init(self, theta_N: Tensor) -> State:
        return {"m": torch.zeros_like(theta_N)}

    def update(self, theta_N: Tensor, estimate: Estimate, state: State, learning_rate: float) -> tuple[Tensor, State]:
        m_N = state["m"] * self.beta + estimate.gradient() * (1 - self.beta)
        return theta_N - m_N * learning_rate, {"m": m_N}

    def refresh(self, state: State, transfer: Callable[[Tensor], Tensor]) -> State:
        return {"m": transfer(state["m"])}
