"""P-RGE: it trains an adapter with a frozen A (LoRA-FA), by several two-sided queries in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vllm_zo.methods.base import AdapterMethod
from vllm_zo.methods.coordinates import Coordinates, LeftFactor


@dataclass(frozen=True, kw_only=True)
class LoRAFA(AdapterMethod):
    """`W + alpha/r * B A`. A is uniform in +-1/sqrt(in), as in `peft`, and frozen. B starts at zero and trains.

        B <- B - lr * 1/K sum_k c_k U_k,   c_k = (L(B + eps U_k) - L(B - eps U_k)) / (2 eps),   U_k ~ N(0, I)

    A run has one basis, so the adapter stays as wide as r. `eps` and learning rates are those of an adapter (1e-2 and
    1e-4), not those of dense weights (1e-3 and 1e-7).

    Source: MobiZO (P-RGE), arXiv:2409.15520; LoRA-FA, arXiv:2308.03303.
    """

    name = "lora-fa"
    refusals: ClassVar[Mapping[str, str]] = {"fold": "A stays for the whole run: there is no refresh to fold at"}

    rank: int = 8
    """Rank of the adapter."""
    alpha: float = 16.0
    """LoRA's alpha. The method multiplies the adapter by alpha / rank."""
    eps: float = 1e-2
    queries: int = 4

    @property
    def coordinates(self) -> Coordinates:
        return LeftFactor(self.rank, v="kaiming", v_scale=self.alpha / self.rank)
