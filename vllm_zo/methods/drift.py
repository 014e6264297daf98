"""How far an update has moved from the base, and two updates of a job from each other.

    norm(s)        = sqrt(sum over modules of ||dW_s||_F^2)
    distance(s, t) = sqrt(sum over modules of ||dW_s - dW_t||_F^2)

No dW is made: of factors, ||U V^T||_F^2 = sum((U^T U) * (V^T V)), in float64, and a difference of two is
[U_s, -U_t] [V_s, V_t]^T.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""U (O, R) and V (I, R) of a module: its update is U V^T."""


def norm(update: Iterable[Factors]) -> float:
    """The Frobenius norm of an update: the distance of all trained weights from the base's."""
    return math.sqrt(sum(_squared(u_OR, v_IR) for u_OR, v_IR in update))


def distance(one: Mapping[str, Factors], other: Mapping[str, Factors]) -> float:
    """The Frobenius norm of the difference between two updates of the same modules."""
    return norm(
        (torch.cat([u, -other[module][0]], 1), torch.cat([v, other[module][1]], 1)) for module, (u, v) in one.items()
    )


def _squared(u_OR: Tensor, v_IR: Tensor) -> float:
    u, v = u_OR.double(), v_IR.double()
    # Rounding may leave a difference of equal updates just below zero.
    return max(((u.T @ u) * (v.T @ v)).sum().item(), 0.0)
