"""FZOO's estimate: one-sided differences, divided by their standard deviation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_zo.methods.estimators.one_sided import OneSided
from vllm_zo.methods.plan import ProbePlan


@dataclass(frozen=True, kw_only=True)
class StdNormalised(OneSided):
    """`g / sigma`, with `g = 1/(eps K) sum_k (l_k - l_0) Z_k` and `sigma^2 = 1/(K-1) sum_k (l_k - mean l)^2`.

    sigma is near eps times the norm of the gradient, so the length of a step hardly depends on how steep the loss is.
    If all losses are equal (sigma = 0), the estimate is zero; the paper leaves that case open.

    Source: FZOO, arXiv:2506.09034, Algorithm 1.
    """

    name = "fzoo"
    gives_slopes = False
    min_queries = 2

    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        sigma = losses_PE[1:].mean(dim=1).std()
        # `where` and no `if`: the host would wait for sigma. It drops the 0 / 0, and lets a NaN loss through.
        return torch.where(sigma == 0, 0.0, super().coefficients(plan, losses_PE) / sigma)
