"""Both factors of an adapter are trained, as in MeZO's LoRA mode."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.coordinates.base import Block, Coordinates
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.methods.probe import ProbePlan

if TYPE_CHECKING:
    from vllm_zo.methods.state import AdapterState


@dataclass(frozen=True)
class TwoFactors(Coordinates):
    """`delta W = v_scale * B (A_0 + a)^T` with theta = (B, a): B (O x r) and a (I x r) start at zero.

    A_0 is uniform in +-1/sqrt(I), what `peft` starts A with. Not linear in theta: a slot holds the product as

        [B, B, b] [A, da, A + da]^T,     (b, da) the perturbation and A = A_0 + a

    so that neither factor absorbs its perturbation in 16 bits.
    """

    v_scale: float = 1.0

    refreshed = "A_0"

    def ranges(self, layout: FactorLayout) -> noise.ElementRanges:
        return layout.ranges([(m.out_features + m.in_features) * self.rank for m in layout.modules])

    def basis(self, key: int, layout: FactorLayout, device: torch.device) -> Tensor:
        parts = layout.split_v(noise.uniform(key, layout.v_ranges, device))
        return torch.cat([(part / math.sqrt(len(part))).flatten() for part in parts])

    def split(self, theta_N: Tensor, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        """Flat B and flat a."""
        us, vs = [], []
        for part, m in zip(theta_N.split(self.ranges(layout).counts), layout.modules, strict=True):
            u, v = part.split([m.out_features * self.rank, m.in_features * self.rank])
            us.append(u)
            vs.append(v)
        return torch.cat(us), torch.cat(vs)

    def factors(self, theta_N: Tensor, basis: Tensor, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        u_N, a_N = self.split(theta_N, layout)
        return u_N, (basis + a_N) * self.v_scale

    def matrices(self, theta_N: Tensor, layout: FactorLayout) -> list[Tensor]:
        views = []
        for part, m in zip(theta_N.split(self.ranges(layout).counts), layout.modules, strict=True):
            u, v = part.split([m.out_features * self.rank, m.in_features * self.rank])
            views += [u.view(-1, self.rank), v.view(-1, self.rank)]
        return views

    def num_blocks(self, num_bases: int) -> int:
        return 3

    def blocks(self, state: AdapterState, plan: ProbePlan, probe: int) -> list[Block]:
        p = plan.probes[probe]
        version = (plan.basis, state.versions[0])
        tag = (plan.step, plan.round, p) if p.sign else "zero"

        def state_factors() -> tuple[Tensor, Tensor]:
            return self.factors(state.acc_BN[0], state.basis(plan.basis), state.layout)

        def moved_factors() -> tuple[Tensor, Tensor]:
            b_N, da_N = self.split(state.offset(plan, probe), state.layout)
            return b_N, da_N * self.v_scale

        main = Block(1, version, version, lambda: state_factors()[0], lambda: state_factors()[1])
        if not p.sign:
            return [main]
        return [
            Block(0, tag, (version, tag), lambda: moved_factors()[0], lambda: state_factors()[1] + moved_factors()[1]),
            main,
            Block(2, version, tag, lambda: state_factors()[0], lambda: moved_factors()[1]),
        ]
