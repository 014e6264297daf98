"""Coordinates in which both factors of an adapter train, as in MeZO's LoRA mode."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.coordinates.base import Coordinates
from vllm_zo.methods.layout import FactorLayout


@dataclass(frozen=True)
class TwoFactors(Coordinates):
    """`delta W = v_scale * B (A_0 + a)^T` with theta = (B, a): B (O x r) and a (I x r) start at zero.

    A_0 is uniform in +-1/sqrt(I), as `peft` initialises A. The change is not linear in theta, so `methods/adapter.py`
    multiplies out a perturbation of both factors.

    Source: LoRA, arXiv:2106.09685, Equation 3; MeZO, arXiv:2305.17333, Section 3, perturbs all of it.
    """

    v_scale: float = 1.0
    """LoRA's alpha / r."""

    refreshed = "A_0"
    trains_v = True

    def ranges(self, layout: FactorLayout) -> noise.ElementRanges:
        return layout.ranges([(m.out_features + m.in_features) * self.rank for m in layout.modules])

    def draw_frozen(self, key: int, layout: FactorLayout, device: torch.device) -> Tensor:
        """(N_V,) float32 A_0."""
        parts = layout.split_v(noise.uniform(key, layout.v_ranges, device))
        return torch.cat([(part / math.sqrt(len(part))).flatten() for part in parts])

    def split(self, theta_N: Tensor, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        """Flat B (N_U,) and flat a (N_V,). In theta they alternate, module by module."""
        us, vs = [], []
        for part, m in zip(theta_N.split(self.ranges(layout).counts), layout.modules, strict=True):
            u, v = part.split([m.out_features * self.rank, m.in_features * self.rank])
            us.append(u)
            vs.append(v)
        return torch.cat(us), torch.cat(vs)

    def factors(self, theta_N: Tensor, frozen: Tensor, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        u_N, a_N = self.split(theta_N, layout)
        return u_N, (frozen + a_N) * self.v_scale

    def factor_changes(self, offset_N: Tensor, frozen: Tensor, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        b_N, a_N = self.split(offset_N, layout)
        return b_N, a_N * self.v_scale

    def matrices(self, theta_N: Tensor, layout: FactorLayout) -> list[Tensor]:
        """B (O, R) and a (I, R) of every module, in turn."""
        views = []
        for part, m in zip(theta_N.split(self.ranges(layout).counts), layout.modules, strict=True):
            u, v = part.split([m.out_features * self.rank, m.in_features * self.rank])
            views += [u.view(-1, self.rank), v.view(-1, self.rank)]
        return views
