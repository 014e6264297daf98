"""The decision of a step: losses become coefficients. The worker makes it on the device, the log path on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_zo.methods.base import Method
from vllm_zo.methods.plan import ProbePlan


def decide(
    method: Method, plan: ProbePlan, losses_PE: Tensor, max_coefficient: float | None = None
) -> tuple[Tensor, Tensor]:
    """The coefficients that a step applies. Nothing here waits for the device of the losses.

    Args:
        plan: of the whole step.
        losses_PE: (P, E) float32, nats, in the order of the plan's probes.
        max_coefficient: the largest absolute coefficient; None: no limit.

    Returns:
        (K,) float32 coefficients, all zero if a loss or a coefficient was not finite; and a bool tensor that tells
        whether all were finite.
    """
    coefficients_K = method.coefficients(plan, losses_PE)
    if max_coefficient is not None:
        coefficients_K = coefficients_K.clamp(-max_coefficient, max_coefficient)
    # Both are checked: the clamp makes an infinite coefficient finite, and then only the losses show it.
    finite = torch.isfinite(losses_PE).all() & torch.isfinite(coefficients_K).all()
    # `where` keeps the flag on the device; an `if` would wait for it.
    return torch.where(finite, coefficients_K, torch.zeros_like(coefficients_K)), finite
