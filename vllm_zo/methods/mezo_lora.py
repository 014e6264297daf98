"""MeZO in its LoRA mode: both factors of an adapter are perturbed and trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vllm_zo.methods.base import MAX_RANK, Method
from vllm_zo.methods.coordinates import Coordinates, TwoFactors
from vllm_zo.validation import check_float, check_int


@dataclass(frozen=True, kw_only=True)
class MeZOLoRA(Method):
    """`W + alpha/r * B A` with (A, B) as the parameters of MeZO: both perturbed along N(0, I), both moved.

    A starts uniform in +-1/sqrt(in), B at zero, as in `peft`. MeZO trains q_proj and v_proj:
    `target_modules=r".*\\.(q_proj|v_proj)"`. A slot holds the product in three blocks of the rank.

    Source: MeZO, arXiv:2305.17333, Section 3 and Appendix D (r 8, alpha 16, eps 1e-2, lr 5e-5 to 1e-4).
    """

    name = "mezo-lora"
    update_spaces = ("bank",)
    refusals: ClassVar[Mapping[str, str]] = {
        "fold": "both factors are trained for the whole run: there is no refresh to fold at"
    }

    rank: int = 5
    """Rank of the adapter (5 fits the default slot; the paper has 8, which wants slot_rank 32)."""
    alpha: float = 10.0
    """LoRA's alpha; the adapter counts alpha / rank times, 2 as in the paper."""
    eps: float = 1e-2

    def validate(self) -> None:
        check_int(f"{self.name}.rank", self.rank, 1, MAX_RANK, "vLLM's adapters go no further")
        check_float(f"{self.name}.alpha", self.alpha, above=0.0, fix="MeZO uses 16 at rank 8")
        super().validate()

    @property
    def coordinates(self) -> Coordinates:
        return TwoFactors(self.rank, v_scale=self.alpha / self.rank)
