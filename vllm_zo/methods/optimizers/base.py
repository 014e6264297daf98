"""What an update rule is: a gradient estimate and a state to a step. A small pure pair, as in optax:

    init(theta) -> state                                        {} for a rule without state, which then costs nothing
    update(theta, estimate, state, lr) -> theta, state          out of place, float32

State is a dictionary of named tensors. It lives in AdapterState, goes into snapshots, and is rebuilt bit for bit by a
replay of the seed log, because an update is a function of seeds and logged coefficients alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.coordinates.base import Coordinates
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.methods.probe import ProbePlan
from vllm_zo.validation import check_float

State = dict[str, Tensor]
"""Name -> float32 or float64 tensor, shaped as theta or a scalar."""


@dataclass(frozen=True)
class Estimate:
    """The gradient estimate `sum_k coefficients_k * scale * direction_k`, not formed yet.

    Attributes:
        seeds: of the directions.
        draws: makes (or has kept) what `Coordinates.draw` gives for each direction, (K, M).
        coefficients_K: float32, as logged.
        regenerates: directions are drawn anew while they are added, and never stored; the coordinates draw normals.
    """

    coordinates: Coordinates
    layout: FactorLayout
    seeds: Sequence[int]
    draws: Callable[[], Tensor]
    coefficients_K: Tensor
    regenerates: bool = False

    def _directions(self) -> Iterator[Tensor]:
        for index, draw in enumerate(self.draws().unbind()):
            yield self.coordinates.embed(draw, index, self.layout)

    def descend(self, theta_N: Tensor, step_size: float) -> Tensor:
        """`theta - step_size * estimate`, out of place, in a fixed order of K and without forming the estimate.

        The order is fixed (a loop, not a matmul) so that replaying the log gives the same bits for any thread count.
        """
        factor = -(step_size * self.coordinates.scale)
        if self.regenerates:
            ranges = self.coordinates.ranges(self.layout)
            return noise.add_normals(theta_N, self.seeds, self.coefficients_K, factor, ranges)
        for coefficient, u_N in zip(self.coefficients_K.unbind(), self._directions(), strict=True):
            theta_N = noise.add_scaled(theta_N, u_N, coefficient, factor)
        return theta_N

    def gradient(self) -> Tensor:
        """(N,) the estimate."""
        return self.descend(torch.zeros(self._size(), device=self.coefficients_K.device), -1.0)

    def _size(self) -> int:
        return self.coordinates.ranges(self.layout).total


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """Frozen, picklable, without state of its own."""

    name: ClassVar[str]
    needs_matrices: ClassVar[bool] = False
    """Whether it only makes sense where a module's trained numbers are matrices."""
    scale_free: ClassVar[bool] = False
    """Whether a step is as long whatever the scale of the losses."""
    auto_share: ClassVar[float] = 1.0
    """What `learning_rate="auto"` makes of a step: this share of a probe's radius (methods/step_size.py)."""

    weight_decay: float = 0.0
    """Decoupled: the whole adapter shrinks by `1 - lr * weight_decay` a step, towards the pretrained weights. Defined
    in `bank` space; in `fold` space the update is part of W, and W itself would have to shrink at every step."""

    def validate(self) -> None:
        """Raise ConfigError when a setting is out of range."""
        check_float(f"{self.name}.weight_decay", self.weight_decay, at_least=0.0)

    def init(self, theta_N: Tensor) -> State:
        return {}

    @abstractmethod
    def update(
        self, theta_N: Tensor, estimate: Estimate, state: State, learning_rate: float
    ) -> tuple[Tensor, State]: ...

    def refresh(self, state: State, transfer: Callable[[Tensor], Tensor]) -> State:
        """The state in the coordinates of another basis; `transfer` says a vector there."""
        return state

    def next_round(self, plan: ProbePlan) -> ProbePlan | None:
        """A further round of probes before the step is taken, or None. Its shape must not depend on losses: nothing
        waits for the host."""
        return None

    def settle(self, coefficients_K: Tensor, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        """The coefficients to apply, after the losses of a further round."""
        return coefficients_K


def check_beta(name: str, value: object) -> None:
    """A decay rate: a number in [0, 1)."""
    check_float(name, value, at_least=0.0, below=1.0)
