"""TeZO: two factors stay fixed for the whole run. It draws and trains only the weights of their rank-1 products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vllm_zo.methods.base import Method, rank_option
from vllm_zo.methods.coordinates import Coordinates, Diagonal


@dataclass(frozen=True, kw_only=True)
class TeZO(Method):
    """`Z_k = U diag(tau_k) V^T`, tau_k ~ N(0, I_r). The entries of U and V are standard normals, drawn once.

    It trains r numbers for each module, so state, momentum and Adam's moments take a few kilobytes for any model.

    Two things differ from the paper. Its TeZO-Adam approximates Adam's second moment of the dense weights by a product
    of squared factors, whose square root is no low-rank matrix; here `optimizer=Adam()` is Adam on tau. And all modules
    have the same rank; the paper derives one for each from singular values.

    Source: TeZO: Empowering the Low-Rankness on the Temporal Dimension in the Zeroth-Order Optimization,
    arXiv:2501.19057, Algorithm 1.
    """

    name = "tezo"
    update_spaces = ("bank",)
    refusals: ClassVar[Mapping[str, str]] = {"fold": "U and V stay for the whole run: there is no refresh to fold at"}

    rank: int = rank_option(8)
    """The rank of U and V."""

    @property
    def coordinates(self) -> Coordinates:
        return Diagonal(self.rank)
