"""An orthogonalised step: every singular value of a module's estimate, or of its momentum, becomes 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_zo.methods.linear_algebra import matrix_sign
from vllm_zo.methods.optimizers.base import Estimate, Optimizer, State, beta_option


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """`M <- b M + g;  theta <- theta - lr * msign(M)`, module by module, with msign(X S Y^T) = X Y^T.

    With `beta` 0 (ZO-Muon has no momentum) there is no state. The matrix sign is exact, from the eigenvalues of the
    small Gram matrix in float64; Muon's Newton-Schulz iteration approximates it. Singular values of zero stay zero, so
    with fewer queries than columns the step has a lower rank.

    Source: ZO-Muon, arXiv:2602.17155; Muon, Jordan et al. 2024.
    """

    name = "muon"
    scale_free = True
    # Measured: the best of the search of benchmarks/methods.py on the demo model. It is far above 1, because a matrix
    # (O, r) of unit singular values is sqrt(O) times shorter than a Gaussian one.
    auto_share = 150.0
    needs_matrices = True

    beta: float = beta_option(0.0, "Decay of the momentum; 0: none.")

    def init(self, theta_N: Tensor) -> State:
        return {"m": torch.zeros_like(theta_N)} if self.beta else {}

    def update(self, theta_N: Tensor, estimate: Estimate, state: State, learning_rate: float) -> tuple[Tensor, State]:
        m_N = estimate.gradient()
        if self.beta:
            m_N = state["m"] * self.beta + m_N
        matrices = estimate.coordinates.matrices(m_N, estimate.layout)
        step_N = torch.cat([matrix_sign(matrix).flatten() for matrix in matrices])
        return theta_N - step_N * learning_rate, {"m": m_N} if self.beta else {}

    def refresh(self, state: State, transfer: Callable[[Tensor], Tensor]) -> State:
        return {"m": transfer(state["m"])} if self.beta else {}
