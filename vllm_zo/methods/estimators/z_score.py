"""The estimate of evolution strategies: antithetic members, whose fitness it standardises over the population."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_zo.methods.estimators.base import Estimator, pairs
from vllm_zo.methods.plan import Probe, ProbePlan


@dataclass(frozen=True, kw_only=True)
class ZScore(Estimator):
    """`sqrt(N) * 1/N sum_i z_i sigma E_i`, over the N = 2K members `W + sigma E_i` with `E_{2k+1} = -E_{2k}`.

    z_i is the loss of member i minus the population's mean, divided by the standard deviation (with N, not N - 1). The
    paper's fitness is minus the loss, so its `W += lr * ...` is our `W -= lr * ...`. If all losses are equal, the
    estimate is zero.

    Source: EGGROLL, arXiv:2511.16652; without the square root and sigma, ES at Scale, arXiv:2509.24372.
    """

    name = "z-score"
    gives_slopes = False

    def probes(self, keys: Sequence[int], eps: float) -> tuple[Probe, ...]:
        return pairs(keys, eps)

    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        mean_P = losses_PE.mean(dim=1)
        spread = mean_P.std(correction=0)
        # `where` and no `if`: the host would wait for the spread. It drops the 0 / 0, and lets a NaN loss through.
        z_P = torch.where(spread == 0, 0.0, (mean_P - mean_P.mean()) / spread)
        # The two members of a pair have opposite E, so one direction takes the difference of their z.
        return (z_P[0::2] - z_P[1::2]) * (plan.probes[0].eps / math.sqrt(len(mean_P)))
