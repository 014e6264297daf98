"""Coordinates in which U trains and V is frozen: those of LoZO, and of an adapter whose A does not move."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.coordinates.base import Coordinates
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.methods.linear_algebra import check_columns_fit, orthonormal
from vllm_zo.methods.plan import ModuleShape

Draw = Literal["normal", "rademacher", "orthonormal", "kaiming", "activations", "written"]
LoZOLeft = Literal["normal", "written"]
LoZORight = Literal["normal", "activations"]
ACTIVATIONS, WRITTEN = "activations", "written"


@dataclass(frozen=True)
class LeftFactor(Coordinates):
    """`delta W = U V^T` with theta = U.

    Attributes:
        u: how to draw the entries of a direction: "normal" N(0, 1), or "rademacher", +1 or -1. Or "written": normal,
            with rows in measured sizes (methods/written.py).
        v: how to draw V: "normal", "rademacher", "orthonormal" columns (QR of a Gaussian), or "kaiming", which is
            uniform in +-1/sqrt(I), as `peft` initialises A. Or "activations": V is not drawn, but measured
            (methods/leading.py).
        v_scale: a factor of V (an adapter's alpha / r).

    Source: normal U and V: LoZO, arXiv:2410.07698, Algorithm 1; random signs: FZOO, arXiv:2506.09034, Algorithm 1;
    orthonormal V: ZO-Muon, arXiv:2602.17155; a frozen A: LoRA-FA, arXiv:2308.03303.
    """

    u: Draw = "normal"
    v: Draw = "normal"
    v_scale: float = 1.0

    refreshed = "V"

    @property
    def draws_normals(self) -> bool:
        kept = type(self).draw is LeftFactor.draw and type(self).embed is Coordinates.embed
        return self.u == "normal" and kept

    @property
    def measures_u(self) -> bool:
        return self.u == WRITTEN

    @property
    def measures_v(self) -> bool:
        return self.v == ACTIVATIONS

    @property
    def measured(self) -> str | None:
        if self.measures_v:
            return f"v={self.v!r}"
        return f"u={self.u!r}" if self.measures_u else None

    def check_module(self, module: ModuleShape) -> None:
        if self.v == "orthonormal":
            check_columns_fit(module, self.rank, module.in_features)

    def ranges(self, layout: FactorLayout) -> noise.ElementRanges:
        return layout.u_ranges

    def draw(self, key: int, layout: FactorLayout, device: torch.device) -> Tensor:
        return _DRAWS[self.u](key, layout.u_ranges, device)

    def draw_frozen(self, key: int, layout: FactorLayout, device: torch.device) -> Tensor:
        """(N_V,) float32 V."""
        assert not self.measures_v, "the state holds a V that is measured"
        if self.v == "orthonormal":
            parts = layout.split_v(noise.normal(key, layout.v_ranges, device))
            v_N = torch.cat([orthonormal(part).flatten() for part in parts])
        elif self.v == "kaiming":
            parts = layout.split_v(noise.uniform(key, layout.v_ranges, device))
            v_N = torch.cat([(part / math.sqrt(len(part))).flatten() for part in parts])
        else:
            v_N = _DRAWS[self.v](key, layout.v_ranges, device)
        return v_N if self.v_scale == 1.0 else v_N * self.v_scale

    def factors(self, theta_N: Tensor, frozen: Tensor, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        return theta_N, frozen

    def transfer(self, vector_N: Tensor, old: Tensor, new: Tensor, layout: FactorLayout) -> Tensor:
        """`M V_old^T V_new / I`, the projection of M V_old^T on the new V. An orthonormal V needs no division by I, and
        a measured one, whose columns have any length, needs `(V_new^T V_new)^-1` in its place.

        It computes in float64 and rounds once, because a product's order of addition depends on the number of threads
        and would change the last bits of a float32 replay.

        Source: LOZO-M, arXiv:2410.07698, Section 4.3.
        """
        moved = []
        parts = zip(layout.split_u(vector_N), layout.split_v(old), layout.split_v(new), strict=True)
        for m_OR, old_IR, new_IR in parts:
            old_V, new_V = old_IR.double(), new_IR.double()
            overlap = old_V.T @ new_V
            if self.measures_v:
                overlap = torch.linalg.solve(new_V.T @ new_V, overlap, left=False)
            elif self.v != "orthonormal":
                overlap = overlap / len(old_IR)
            moved.append((m_OR.double() @ overlap).float().flatten())
        return torch.cat(moved)

    def matrices(self, theta_N: Tensor, layout: FactorLayout) -> list[Tensor]:
        return layout.split_u(theta_N)


_DRAWS: dict[str, Callable[[int, noise.ElementRanges, torch.device], Tensor]] = {
    "normal": lambda key, ranges, device: noise.normal(key, ranges, device),
    "rademacher": lambda key, ranges, device: noise.rademacher(key, ranges, device),
    "written": lambda key, ranges, device: noise.normal(key, ranges, device),  # the state has the rows' sizes
}


@dataclass(frozen=True)
class Population(LeftFactor):
    """`LeftFactor` of rank `members * member_rank`, in which direction k moves only its own columns of U.

    The directions of a step then share no column of U or V, and the adapters of all members have one V.

    Source: EGGROLL, arXiv:2511.16652 (members E_i = A_i B_i^T / sqrt(r)).
    """

    member_rank: int = 1

    def draw(self, key: int, layout: FactorLayout, device: torch.device) -> Tensor:
        """(sum of O * member_rank,) float32: the columns that are not zero, module by module.

        Drawing and keeping only these saves memory: a whole direction is `members` times as large.
        """
        return noise.normal(key, layout.ranges([m.out_features * self.member_rank for m in layout.modules]), device)

    def embed(self, draw: Tensor, index: int, layout: FactorLayout) -> Tensor:
        out = torch.zeros(layout.u_ranges.total, dtype=draw.dtype, device=draw.device)
        columns = slice(index * self.member_rank, (index + 1) * self.member_rank)
        parts = draw.split([m.out_features * self.member_rank for m in layout.modules])
        for u_OR, part in zip(layout.split_u(out), parts, strict=True):
            u_OR[:, columns] = part.view(-1, self.member_rank)
        return out
