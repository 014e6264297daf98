"""MeZO in its LoRA mode: it perturbs and trains both factors of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vllm_zo.methods.base import AdapterMethod
from vllm_zo.methods.coordinates import Coordinates, TwoFactors


@dataclass(frozen=True, kw_only=True)
class MeZOLoRA(AdapterMethod):
    """`W + alpha/r * B A` with (A, B) as the parameters of MeZO: it perturbs both along N(0, I) and moves both.

    A starts uniform in +-1/sqrt(in) and B at zero, as in `peft`. MeZO's paper trains q_proj and v_proj, here
    `target_modules=r".*\\.(q_proj|v_proj)"`. The adapter of a probe takes three times the rank (`methods/adapter.py`).

    Source: MeZO, arXiv:2305.17333, Section 3 and Appendix D (r 8, alpha 16, eps 1e-2, lr 5e-5 to 1e-4).
    """

    name = "mezo-lora"
    auto_share = 0.2
    """Measured on the demo model: both factors move, so their product moves further, and steps of a whole radius
    overshot."""
    refusals: ClassVar[Mapping[str, str]] = {
        "fold": "both factors are trained for the whole run: there is no refresh to fold at"
    }

    rank: int = 5
    """Rank of the adapter. A probe takes three times as much, so 5 fits an engine's default slot rank of 16. The
    paper's 8 needs 32."""
    alpha: float = 10.0
    """LoRA's alpha. The method multiplies the adapter by alpha / rank, which is 2 as in the paper."""
    eps: float = 1e-2

    @property
    def coordinates(self) -> Coordinates:
        return TwoFactors(self.rank, v_scale=self.alpha / self.rank)
