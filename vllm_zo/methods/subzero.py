"""SubZero: Gaussian directions inside a random subspace, with orthonormal factors on both sides."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_zo.methods.base import LowRankMethod
from vllm_zo.methods.coordinates import Coordinates, Core


@dataclass(frozen=True, kw_only=True)
class SubZero(LowRankMethod):
    """`Z_k = sqrt(O I)/r * U C_k V^T`. C_k is an r x r Gaussian; U (out x r) and V (in x r) come from QR and stay for
    `interval` steps.

    As in the official code, the factor sqrt(O I)/r makes the expected squared norm of Z_k that of a dense Gaussian, so
    MeZO's learning rates carry over. The paper uses r = 24 to 128. An engine's default slot rank of 16 has room for one
    basis of rank 8.

    Source: Zeroth-Order Fine-Tuning of LLMs in Random Subspaces, arXiv:2410.08989, Algorithm 2 (official code:
    zimingyy/SubZero).
    """

    name = "subzero"

    rank: int = 8
    interval: int = 1000

    @property
    def coordinates(self) -> Coordinates:
        return Core(self.rank)
