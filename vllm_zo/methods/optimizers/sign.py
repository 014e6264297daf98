"""Steps along the sign of the estimate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vllm_zo.methods.optimizers.base import Estimate, Optimizer, State


@dataclass(frozen=True, kw_only=True)
class Sign(Optimizer):
    """`theta <- theta - lr * sign(g)`, entry by entry of the trained numbers. No state.

    It takes the sign of the trained numbers, not of the dense estimate, because the sign of a low-rank matrix has no
    low rank.

    Source: ZO-signSGD, Liu et al., ICLR 2019.
    """

    name = "sign"
    scale_free = True

    def update(self, theta_N: Tensor, estimate: Estimate, state: State, learning_rate: float) -> tuple[Tensor, State]:
        return theta_N - estimate.gradient().sign() * learning_rate, state
