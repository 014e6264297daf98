"""Every entry of the weight is trained: no factors, no adapter."""

from __future__ import annotations

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
class Dense(Coordinates):
    """`delta W = theta`, (out x in). A probe is no adapter: it is written into the base weights, one at a time."""

    refreshed = "nothing"
    in_place = True

    rank: int = 1
    """Of the (empty) adapter that members name."""

    def ranges(self, layout: FactorLayout) -> noise.ElementRanges:
        return layout.ranges([m.out_features * m.in_features for m in layout.modules])

    def basis(self, key: int, layout: FactorLayout, device: torch.device) -> None:
        return None

    def factors(self, theta_N: Tensor, basis: None, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a dense change has no factors")

    def module_factors(self, theta_N: Tensor, basis: None, layout: FactorLayout) -> tuple[list[Tensor], list[None]]:
        return self.matrices(theta_N, layout), [None] * len(layout.modules)

    def matrices(self, theta_N: Tensor, layout: FactorLayout) -> list[Tensor]:
        parts = zip(theta_N.split(self.ranges(layout).counts), layout.modules, strict=True)
        return [part.view(m.out_features, m.in_features) for part, m in parts]

    def blocks(self, state: AdapterState, plan: ProbePlan, probe: int) -> list[Block]:
        return []
