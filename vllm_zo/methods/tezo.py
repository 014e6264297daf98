"""TeZO: two fixed factors for the whole run, only the weights of their rank-1 products are drawn and trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vllm_zo.methods.base import MAX_RANK, Method
from vllm_zo.methods.coordinates import Coordinates, Diagonal
from vllm_zo.validation import check_int


@dataclass(frozen=True, kw_only=True)
class TeZO(Method):
    """`Z_k = U diag(tau_k) V^T`, tau_k ~ N(0, I_r), with U and V of standard normals drawn once.

    Trained are r numbers a module: state, momentum and Adam's moments are a few kilobytes for any model.

    Where this differs from the paper: TeZO-Adam there approximates Adam's second moment of the dense weights by a
    product of squared factors, whose square root is no low-rank matrix; `optimizer=Adam()` here is Adam on tau. The
    rank is one number for all modules (the paper derives one for each from singular values).

    Source: TeZO: Empowering the Low-Rankness on the Temporal Dimension in the Zeroth-Order Optimization,
    arXiv:2501.19057, Algorithm 1.
    """

    name = "tezo"
    update_spaces = ("bank",)
    refusals: ClassVar[Mapping[str, str]] = {"fold": "U and V stay for the whole run: there is no refresh to fold at"}

    rank: int = 8
    """Rank of U and V."""

    def validate(self) -> None:
        check_int(f"{self.name}.rank", self.rank, 1, MAX_RANK, "vLLM's adapters go no further")
        super().validate()

    @property
    def coordinates(self) -> Coordinates:
        return Diagonal(self.rank)
