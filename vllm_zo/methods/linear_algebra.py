"""Small matrix functions. They compute in float64 and round once to float32.

LAPACK may add in another order on another machine or with another number of threads. In float64 such differences are
far below float32's rounding, so that a replay almost always gives the same float32 numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_zo.errors import ConfigError
from vllm_zo.methods.plan import ModuleShape


def check_columns_fit(module: ModuleShape, rank: int, most: int) -> None:
    """Check that a module has room for `rank` orthonormal columns.

    Raises:
        ConfigError: `rank` exceeds `most`. The message names the module.
    """
    if rank > most:
        raise ConfigError(f"rank={rank}: {module.name} has room for {most} orthonormal columns; set rank <= {most}.")


def orthonormal(matrix_NR: Tensor) -> Tensor:
    """(N, R) float32 with orthonormal columns that span the columns of `matrix_NR`; it needs N >= R.

    The result is Q of the QR decomposition whose R has a positive diagonal. That makes Q unique, and uniformly
    distributed for a Gaussian matrix.
    """
    # LAPACK chooses the signs of R's diagonal; another version may choose others, and V would differ in sign.
    q, r = torch.linalg.qr(matrix_NR.double())
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).float()


def matrix_sign(matrix_NR: Tensor) -> Tensor:
    """(N, R) float32 `X Y^T` of the singular value decomposition X S Y^T: every singular value becomes 1.

    The function takes it from the eigenvalues of the smaller Gram matrix. Singular values that are zero to rounding
    stay zero.
    """
    m = matrix_NR.double()
    tall = m if m.shape[0] >= m.shape[1] else m.T
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    # Eigenvalues of the Gram matrix are squares: 1e-12 of the largest is 1e-6 of a singular value, float32's rounding.
    tiny = values <= values.max().clamp_min(0.0) * 1e-12
    inverse_root = torch.where(tiny, 0.0, values.clamp_min(1e-300).rsqrt())
    sign = tall @ (vectors * inverse_root) @ vectors.T
    return (sign if m.shape[0] >= m.shape[1] else sign.T).float()
