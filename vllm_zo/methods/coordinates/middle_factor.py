"""Coordinates in which U and V are frozen and a matrix between them trains: diagonal (TeZO) or full r x r (SubZero)."""

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
from vllm_zo.methods.plan import ModuleShape


class FrozenFactors(NamedTuple):
    """The frozen U and V of all modules, flat (N_U,) and (N_V,) float32."""

    u_N: Tensor
    v_N: Tensor


@dataclass(frozen=True)
class Diagonal(Coordinates):
    """`delta W = U diag(tau) V^T` with theta = tau, r numbers for each module. The entries of U and V are N(0, 1).

    Source: TeZO, arXiv:2501.19057, Algorithm 1.
    """

    refreshed = "U and V"
    has_matrices = False

    def ranges(self, layout: FactorLayout) -> noise.ElementRanges:
        return layout.ranges([self.rank] * len(layout.modules))

    def draw_frozen(self, key: int, layout: FactorLayout, device: torch.device) -> FrozenFactors:
        # A key of its own: with V's key, the first entries of a module's U and V would be the same numbers.
        u_key = noise.derive_key(key, "left")
        return FrozenFactors(noise.normal(u_key, layout.u_ranges, device), noise.normal(key, layout.v_ranges, device))

    def factors(self, theta_N: Tensor, frozen: FrozenFactors, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        parts = zip(layout.split_u(frozen.u_N), theta_N.split(self.rank), strict=True)
        return torch.cat([(u_OR * tau_R).flatten() for u_OR, tau_R in parts]), frozen.v_N


@dataclass(frozen=True)
class Core(Coordinates):
    """`delta W = sqrt(O I)/r * U C V^T` with theta = C, r x r; U and V have orthonormal columns (QR of Gaussians).

    With the factor, the expected squared norm of a direction is that of a dense Gaussian: O I.

    Source: SubZero, arXiv:2410.08989, Algorithm 2; the factor is that of the official code (zimingyy/SubZero).
    """

    refreshed = "U and V"

    def check_module(self, module: ModuleShape) -> None:
        check_columns_fit(module, self.rank, min(module.out_features, module.in_features))

    def ranges(self, layout: FactorLayout) -> noise.ElementRanges:
        return layout.ranges([self.rank**2] * len(layout.modules))

    def draw_frozen(self, key: int, layout: FactorLayout, device: torch.device) -> FrozenFactors:
        """U times the factor, and V."""
        # The factor goes into U, so that `factors` is one product for each module and step.
        us = layout.split_u(noise.normal(noise.derive_key(key, "left"), layout.u_ranges, device))
        vs = layout.split_v(noise.normal(key, layout.v_ranges, device))
        scaled = [
            orthonormal(u) * (math.sqrt(m.out_features * m.in_features) / self.rank)
            for u, m in zip(us, layout.modules, strict=True)
        ]
        return FrozenFactors(
            torch.cat([u.flatten() for u in scaled]), torch.cat([orthonormal(v).flatten() for v in vs])
        )

    def factors(self, theta_N: Tensor, frozen: FrozenFactors, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        pairs = zip(layout.split_u(frozen.u_N), self.matrices(theta_N, layout), strict=True)
        return torch.cat([(u_OR.to(c_RR.dtype) @ c_RR).flatten() for u_OR, c_RR in pairs]), frozen.v_N

    def transfer(self, vector_N: Tensor, old: FrozenFactors, new: FrozenFactors, layout: FactorLayout) -> Tensor:
        """`U_new^T (U_old M V_old^T) V_new`, the projection on the new subspace (here U without the factor).

        It computes in float64 and rounds once, because a product's order of addition depends on the number of threads
        and would change the last bits of a float32 replay.
        """
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
            # Both U carry the factor of `draw_frozen`; the projection is onto orthonormal columns.
            squared_factor = m.out_features * m.in_features / self.rank**2
            left = u_new.double().T @ u_old.double() / squared_factor
            moved.append((left @ c_RR.double() @ (v_old.double().T @ v_new.double())).float().flatten())
        return torch.cat(moved)

    def matrices(self, theta_N: Tensor, layout: FactorLayout) -> list[Tensor]:
        return [part.view(self.rank, self.rank) for part in theta_N.split(self.rank**2)]
