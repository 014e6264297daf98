"""Small matrix functions, in float64 and rounded once, so that a replay on the same kind of machine rounds alike."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_zo.errors import ConfigError
from vllm_zo.methods.probe import ModuleShape


def check_columns_fit(module: ModuleShape, rank: int, most: int) -> None:
    """Refuse a rank for which a module has no orthonormal columns."""
    if rank > most:
        raise ConfigError(f"rank={rank}: {module.name} has room for {most} orthonormal columns; set rank <= {most}.")


def orthonormal(matrix_NR: Tensor) -> Tensor:
    """(N, R) float32 with orthonormal columns spanning those of `matrix_NR`: the Q of its QR decomposition, with R's
    diagonal made positive, which makes it unique (and uniform, for a Gaussian matrix). Needs N >= R."""
    q, r = torch.linalg.qr(matrix_NR.double())
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).float()


def matrix_sign(matrix_NR: Tensor) -> Tensor:
    """`X Y^T` of the singular value decomposition X S Y^T: all singular values set to 1, float32.

    Through the eigenvalues of the smaller Gram matrix. Directions in which the matrix has (to rounding) nothing stay
    zero.
    """
    m = matrix_NR.double()
    tall = m if m.shape[0] >= m.shape[1] else m.T
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    tiny = values <= values.max().clamp_min(0.0) * 1e-12
    inverse_root = torch.where(tiny, 0.0, values.clamp_min(1e-300).rsqrt())
    sign = tall @ (vectors * inverse_root) @ vectors.T
    return (sign if m.shape[0] >= m.shape[1] else sign.T).float()
