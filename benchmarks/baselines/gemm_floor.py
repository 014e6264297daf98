"""The six GEMMs of every layer on the packed tokens of both signs, and nothing else: what any exact step must pay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.hand_packed import HandPacked


class GemmFloor(HandPacked):
    """Not a step: no attention, no probes, no loss. Uses the linears of `HandPacked` with its choice of prepacking."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = "gemms"

    def _step(self, batch: list[list[int]], labels: Tensor) -> tuple[float, float]:
        tokens = 2 * sum(map(len, batch))
        narrow = torch.ones(tokens, self.model.config.hidden_size, dtype=self.dtype, device=self.device)
        wide = torch.ones(tokens, self.model.config.ffn_dim, dtype=self.dtype, device=self.device)
        for sites in self.layers:
            for name, site in sites.items():
                site.linear(wide if name == "fc2" else narrow)
        return 0.0, 0.0
