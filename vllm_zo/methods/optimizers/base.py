"""What an update rule is: it makes a step of a gradient estimate and a state. It is a small pure pair, as in optax:

    init(theta) -> state                                        {} for a rule without state, which then costs nothing
    update(theta, estimate, state, lr) -> theta, state          out of place, float32

State is a dictionary of named tensors. It lives in AdapterState and goes into snapshots. A replay of the seed log
rebuilds it bit for bit, because an update is a function of seeds and logged coefficients alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.coordinates.base import Coordinates
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.options import check_options, option

State = dict[str, Tensor]
"""Name -> float32 or float64 tensor, a scalar or of the shape of theta."""


@dataclass(frozen=True)
class Estimate:
    """The gradient estimate `sum_k coefficients_k * scale * direction_k`, before anything has added it up.

    Attributes:
        keys: the keys of the K directions.
        draws: returns the (K, M) float32 draws of the directions (`Coordinates.draw`).
        coefficients_K: (K,) float32, as logged.
        regenerates: whether to draw the directions again while adding them, without storing any. The coordinates must
            then draw plain normals.
    """

    coordinates: Coordinates
    layout: FactorLayout
    keys: Sequence[int]
    draws: Callable[[], Tensor]
    coefficients_K: Tensor
    regenerates: bool = False

    def _directions(self) -> Iterator[Tensor]:
        for index, draw in enumerate(self.draws().unbind()):
            yield self.coordinates.embed(draw, index, self.layout)

    def descend(self, theta_N: Tensor, step_size: float) -> Tensor:
        """(N,) float32 `theta - step_size * estimate`, out of place, without forming the estimate.

        It adds the K directions one by one. A matrix product would add them in an order that depends on the number of
        threads, and a replay of the log would give other bits.
        """
        factor = -(step_size * self.coordinates.scale)
        if self.regenerates:
            ranges = self.coordinates.ranges(self.layout)
            return noise.add_normals(theta_N, self.keys, self.coefficients_K, factor, ranges)
        for coefficient, u_N in zip(self.coefficients_K.unbind(), self._directions(), strict=True):
            theta_N = noise.add_scaled(theta_N, u_N, coefficient, factor)
        return theta_N

    def gradient(self) -> Tensor:
        """(N,) float32 the estimate."""
        return self.descend(torch.zeros(self._size(), device=self.coefficients_K.device), -1.0)

    def _size(self) -> int:
        return self.coordinates.ranges(self.layout).total


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """An update rule is frozen and picklable. Its state is outside, in the dictionary that it receives and returns."""

    name: ClassVar[str]
    needs_matrices: ClassVar[bool] = False
    """Whether the rule needs coordinates whose trained numbers form matrices."""
    scale_free: ClassVar[bool] = False
    """Whether the length of a step does not depend on the scale of the losses."""
    auto_share: ClassVar[float] = 1.0
    """The length of a step with `learning_rate="auto"`, as a share of a probe's radius (methods/step_size.py)."""

    weight_decay: float = option(0.0, minimum=0, help="Shrinks the adapter by 1 - lr * weight_decay a step.")
    """The decay is decoupled from the gradient and pulls towards the pretrained weights. It exists in `bank` space
    only. In `fold` space the update is part of W, and W itself would have to shrink at every step."""

    def __post_init__(self) -> None:
        check_options(self, f"{self.name}.")

    def init(self, theta_N: Tensor) -> State:
        """The state before the first step, for trained numbers like `theta_N`."""
        return {}

    @abstractmethod
    def update(self, theta_N: Tensor, estimate: Estimate, state: State, learning_rate: float) -> tuple[Tensor, State]:
        """(N,) float32 trained numbers and the state -> both after the step.

        It must not write to its arguments: after a loss that is not finite the caller keeps the old values.
        """

    def refresh(self, state: State, transfer: Callable[[Tensor], Tensor]) -> State:
        """The state after a refresh of V; `transfer` projects a vector (N,) on the new V."""
        return state


def beta_option(default: float, help: str) -> Any:
    """The option of a decay rate."""
    return option(default, minimum=0, below=1, help=help)
