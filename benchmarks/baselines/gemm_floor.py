"""The GEMMs of every layer on the packed tokens of both signs, and nothing else. Every exact step pays for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.hand_packed import HandPacked


class GemmFloor(HandPacked):
    """It is no step: it has no attention, no probes and no loss. It uses the linears of `HandPacked` as that packs
    them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = "gemms"

    def _step(self, batch: list[list[int]], labels: Tensor) -> tuple[float, float]:
        tokens = 2 * sum(map(len, batch))
        widths = (self.shape.hidden, self.shape.ffn)
        inputs = {width: torch.ones(tokens, width, dtype=self.dtype, device=self.device) for width in widths}
        for sites in self.layers:
            for site in sites.values():
                site.linear(inputs[site.weight.shape[1]])
        return 0.0, 0.0
