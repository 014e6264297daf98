"""How far a state has moved from the base, and two states of a job from each other.

    norm(s)        = sqrt(sum over modules of ||dW_s||_F^2)
    distance(s, t) = sqrt(sum over modules of ||dW_s - dW_t||_F^2)

No dW is made: of factors, ||U V^T||_F^2 = sum((U^T U) * (V^T V)), in float64, and a difference of two is
[U_s, -U_t] [V_s, V_t]^T.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_zo.methods.adapter import whole_adapter
from vllm_zo.methods.state import AdapterState


def norm(state: AdapterState) -> float:
    """The Frobenius norm of the update: the distance of all trained weights from the base's."""
    return math.sqrt(sum(_squared(u_OR, v_IR) for _, u_OR, v_IR in whole_adapter(state)))


def distance(one: AdapterState, other: AdapterState) -> float:
    """The Frobenius norm of the difference between the updates of two states of a job."""
    pairs = zip(whole_adapter(one), whole_adapter(other), strict=True)
    return math.sqrt(sum(_squared(torch.cat([u, -w], 1), torch.cat([v, x], 1)) for (_, u, v), (_, w, x) in pairs))


def _squared(u_OR: Tensor, v_IR: Tensor) -> float:
    u, v = u_OR.double(), v_IR.double()
    # Rounding may leave a difference of equal states just below zero.
    return max(((u.T @ u) * (v.T @ v)).sum().item(), 0.0)
