"""A step that is taken only if it helps: a second round of probes scores the step before it is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_zo.methods.optimizers.sgd import SGD
from vllm_zo.methods.probe import Probe, ProbePlan


@dataclass(frozen=True, kw_only=True)
class Conserve(SGD):
    """The best of `theta - lr g`, `theta` and `theta + lr g` by the loss of the same mini-batch. No state.

    Three more forward passes a step. The choice only changes the sign of the logged coefficients, or makes them zero;
    a replay is plain SGD. Ties go to the first in the order above: at learning rate 0, where all three are the same,
    the coefficients are those of the estimate, which `learning_rate="auto"` is measured from.

    Source: ZO-SGD-Cons, Kim et al. 2021, as benchmarked in Zhang et al., arXiv:2402.11592.
    """

    name = "conserve"

    def next_round(self, plan: ProbePlan) -> ProbePlan | None:
        if plan.round:
            return None
        probes = tuple(Probe(seed=0, sign=sign, eps=1.0, at_step=True) for sign in (1, 0, -1))
        return ProbePlan(plan.step, probes, plan.basis, round=1)

    def settle(self, coefficients_K: Tensor, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        signs = torch.tensor([1.0, 0.0, -1.0], device=losses_PE.device)
        return coefficients_K * signs[losses_PE.mean(dim=1).argmin()]
