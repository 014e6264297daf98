"""Coordinates without factors or adapter: every entry of the weight trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.coordinates.base import Coordinates
from vllm_zo.methods.layout import FactorLayout


@dataclass(frozen=True)
class Dense(Coordinates):
    """`delta W = theta`, (out x in). A probe is no adapter: the worker writes one at a time into the base weights.

    Source: MeZO, arXiv:2305.17333, Algorithm 1 (z of the size of the weights).
    """

    refreshed = "nothing"
    has_factors = False

    rank: int = 1
    """Rank of the empty adapter that the requests of a probe name."""

    def ranges(self, layout: FactorLayout) -> noise.ElementRanges:
        return layout.ranges([m.out_features * m.in_features for m in layout.modules])

    def draw_frozen(self, key: int, layout: FactorLayout, device: torch.device) -> None:
        return None

    def factors(self, theta_N: Tensor, frozen: None, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a dense change has no factors")

    def module_factors(self, theta_N: Tensor, frozen: None, layout: FactorLayout) -> tuple[list[Tensor], list[None]]:
        return self.matrices(theta_N, layout), [None] * len(layout.modules)

    def matrices(self, theta_N: Tensor, layout: FactorLayout) -> list[Tensor]:
        parts = zip(theta_N.split(self.ranges(layout).counts), layout.modules, strict=True)
        return [part.view(m.out_features, m.in_features) for part, m in parts]
