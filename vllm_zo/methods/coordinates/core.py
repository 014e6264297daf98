"""U and V are frozen, what lies between them is trained: a diagonal (TeZO) or a full r x r matrix (SubZero)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.coordinates.base import Coordinates
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.methods.linear_algebra import check_columns_fit, orthonormal
from vllm_zo.methods.probe import ModuleShape


class FrozenFactors(NamedTuple):
    """Flat (N_U,) and (N_V,)."""

    u_N: Tensor
    v_N: Tensor


@dataclass(frozen=True)
class Diagonal(Coordinates):
    """`delta W = U diag(tau) V^T` with theta = tau, r numbers a module; U and V of standard normals."""

    refreshed = "U and V"
    has_matrices = False

    def ranges(self, layout: FactorLayout) -> noise.ElementRanges:
        return layout.ranges([self.rank] * len(layout.modules))

    def basis(self, key: int, layout: FactorLayout, device: torch.device) -> FrozenFactors:
        u_key = noise.derive_key(key, "left")
        return FrozenFactors(noise.normal(u_key, layout.u_ranges, device), noise.normal(key, layout.v_ranges, device))

    def factors(self, theta_N: Tensor, basis: FrozenFactors, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        parts = zip(layout.split_u(basis.u_N), theta_N.split(self.rank), strict=True)
        return torch.cat([(u_OR * tau_R).flatten() for u_OR, tau_R in parts]), basis.v_N


@dataclass(frozen=True)
class Core(Coordinates):
    """`delta W = sqrt(O I)/r * U C V^T` with theta = C, r x r; U and V have orthonormal columns (QR of Gaussians).

    The factor makes the expected squared norm of a direction that of a dense Gaussian, O I.
    """

    refreshed = "U and V"

    def check_module(self, module: ModuleShape) -> None:
        check_columns_fit(module, self.rank, min(module.out_features, module.in_features))

    def ranges(self, layout: FactorLayout) -> noise.ElementRanges:
        return layout.ranges([self.rank**2] * len(layout.modules))

    def basis(self, key: int, layout: FactorLayout, device: torch.device) -> FrozenFactors:
        """U with the factor on it, and V."""
        us = layout.split_u(noise.normal(noise.derive_key(key, "left"), layout.u_ranges, device))
        vs = layout.split_v(noise.normal(key, layout.v_ranges, device))
        scaled = [
            orthonormal(u) * (math.sqrt(m.out_features * m.in_features) / self.rank)
            for u, m in zip(us, layout.modules, strict=True)
        ]
        return FrozenFactors(
            torch.cat([u.flatten() for u in scaled]), torch.cat([orthonormal(v).flatten() for v in vs])
        )

    def factors(self, theta_N: Tensor, basis: FrozenFactors, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        pairs = zip(layout.split_u(basis.u_N), self.matrices(theta_N, layout), strict=True)
        return torch.cat([(u_OR.to(c_RR.dtype) @ c_RR).flatten() for u_OR, c_RR in pairs]), basis.v_N

    def transfer(self, vector_N: Tensor, old: FrozenFactors, new: FrozenFactors, layout: FactorLayout) -> Tensor:
        """`U_new^T (U_old M V_old^T) V_new`: the projection on the new subspace. In float64, as in `LeftFactor`."""
        moved = []
        for c_RR, u_old, u_new, v_old, v_new, m in zip(
            self.matrices(vector_N, layout),
            layout.split_u(old.u_N),
            layout.split_u(new.u_N),
            layout.split_v(old.v_N),
            layout.split_v(new.v_N),
            layout.modules,
            strict=True,
        ):
            squared_factor = m.out_features * m.in_features / self.rank**2
            left = u_new.double().T @ u_old.double() / squared_factor
            moved.append((left @ c_RR.double() @ (v_old.double().T @ v_new.double())).float().flatten())
        return torch.cat(moved)

    def matrices(self, theta_N: Tensor, layout: FactorLayout) -> list[Tensor]:
        return [part.view(self.rank, self.rank) for part in theta_N.split(self.rank**2)]
