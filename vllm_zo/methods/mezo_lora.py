"""MeZO in its LoRA mode: both factors of an adapter are perturbed and trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vllm_zo.methods.base import AdapterMethod
from vllm_zo.methods.coordinates import Coordinates, TwoFactors


@dataclass(frozen=True, kw_only=True)
class MeZOLoRA(AdapterMethod):
    """`W + alpha/r * B A` with (A, B) as the parameters of MeZO: both perturbed along N(0, I), both moved.

    A starts uniform in +-1/sqrt(in), B at zero, as in `peft`. MeZO trains q_proj and v_proj:
    `target_modules=r".*\\.(q_proj|v_proj)"`. A slot holds the product in three blocks of the rank.

    Source: MeZO, arXiv:2305.17333, Section 3 and Appendix D (r 8, alpha 16, eps 1e-2, lr 5e-5 to 1e-4).
    """

    name = "mezo-lora"
    auto_share = 0.2
    """Both factors move, and the product feels either: whole radii overshot on the demo model."""
    refusals: ClassVar[Mapping[str, str]] = {
        "fold": "both factors are trained for the whole run: there is no refresh to fold at"
    }

    rank: int = 5
    """Rank of the adapter (5 fits the default slot; the paper has 8, which wants slot_rank 32)."""
    alpha: float = 10.0
    """LoRA's alpha; the adapter counts alpha / rank times, 2 as in the paper."""
    eps: float = 1e-2

    @property
    def coordinates(self) -> Coordinates:
        return TwoFactors(self.rank, v_scale=self.alpha / self.rank)
