"""KerZOO: LoZO with a random probe radius and a kernel weight that removes the estimate's third-order bias."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_zo.methods.base import LowRankMethod
from vllm_zo.methods.estimators import Estimator, Kernel


@dataclass(frozen=True, kw_only=True)
class KerZOO(LowRankMethod):
    """`W <- W - lr/K sum_k K(s_k) (L(W + eps s_k Z_k) - L(W - eps s_k Z_k)) / (2 eps) Z_k`,  s_k ~ U[-1, 1].

    One thing differs from the paper: its directions are dense, and ours are LoZO's `U_k V^T`.

    Source: KerZOO: Kernel Function Informed Zeroth-Order Optimization, arXiv:2505.18886, Algorithm 1.
    """

    name = "kerzoo"

    estimator: Estimator = field(default_factory=Kernel)
