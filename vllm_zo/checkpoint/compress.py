"""Truncates a product of thin factors to a lower rank. That is lossy, and done only when a user asks for it."""

from __future__ import annotations

import torch
from torch import Tensor


def truncate(u_OK: Tensor, v_IK: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best approximation of `U V^T` of a given rank (Eckart-Young), without forming the product.

        U = Q_u R_u,  V = Q_v R_v,  R_u R_v^T = X S Y^T   =>   U V^T ~ (Q_u X_r sqrt(S_r)) (Q_v Y_r sqrt(S_r))^T

    Args:
        u_OK, v_IK: (out, K) and (in, K) factors.

    Returns:
        (out, rank) and (in, rank) float32 factors, computed in float64; the squared Frobenius norm of the part that was
        dropped, and that of the whole. Columns beyond min(out, in, K) are zeros.
    """
    q_u, r_u = torch.linalg.qr(u_OK.double())
    q_v, r_v = torch.linalg.qr(v_IK.double())
    x, s, yt = torch.linalg.svd(r_u @ r_v.T)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()  # half of each singular value to either factor, so that both have the same size
    u = torch.zeros(u_OK.shape[0], rank, dtype=torch.float32)
    v = torch.zeros(v_IK.shape[0], rank, dtype=torch.float32)
    u[:, :kept] = (q_u @ (x[:, :kept] * root)).float()
    v[:, :kept] = (q_v @ (yt[:kept].T * root)).float()
    return u, v, float(s[kept:].square().sum()), float(s.square().sum())
