"""SubZero: Gaussian directions inside a random subspace with orthonormal bases on both sides."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_zo.methods.base import LowRankMethod
from vllm_zo.methods.coordinates import Coordinates, Core


@dataclass(frozen=True, kw_only=True)
class SubZero(LowRankMethod):
    """`Z_k = sqrt(O I)/r * U C_k V^T`, C_k ~ N(0, I_{r x r}), U (out x r) and V (in x r) from QR, kept for `interval`.

    As the official code has it, the factor makes the expected squared norm of Z_k that of a dense Gaussian, so MeZO's
    learning rates carry over. The paper uses r = 24 to 128, which wants a larger `slot_rank`.

    Source: Zeroth-Order Fine-Tuning of LLMs in Random Subspaces, arXiv:2410.08989, Algorithm 2 (official code:
    zimingyy/SubZero).
    """

    name = "subzero"

    rank: int = 8
    interval: int = 1000

    @property
    def coordinates(self) -> Coordinates:
        return Core(self.rank)
