"""What benchmarks/candidates.py compares: estimators (which states are scored, and what their losses mean) and rules (a
step of an estimate). All runs of a contender go on at once.

Suffixes of shapes: S seeds, G step sizes and eps, K directions, B rows, C labels, D directions of V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]
"""(S, G, K, C, D) changes of the trained numbers -> (S, G, K, B) losses of the rows."""


class TwoSided:
    """n-SPSA; the others differ in `probes`, the states that they score, and in what they make of the losses."""

    def __init__(self, directions: int = 1) -> None:
        self.directions, self.probes = directions, 2 * directions

    def __call__(self, score: Score, probes: Tensor, eps: Tensor, rows: Tensor) -> Tensor:
        """(S, G, K) the coefficients of the directions."""
        plus, minus = score(torch.cat([probes, -probes], 2)).mean(-1).chunk(2, 2)
        return (plus - minus) / (2 * eps) / self.directions


class OneSided(TwoSided):
    def __init__(self, directions: int) -> None:
        self.directions, self.probes = directions, directions + 1

    def __call__(self, score: Score, probes: Tensor, eps: Tensor, rows: Tensor) -> Tensor:
        losses = score(torch.cat([probes, torch.zeros_like(probes[:, :, :1])], 2)).mean(-1)
        return (losses[:, :, :-1] - losses[:, :, -1:]) / eps / self.directions


class Rloo(TwoSided):
    def __init__(self, directions: int) -> None:
        self.directions = self.probes = directions

    def __call__(self, score: Score, probes: Tensor, eps: Tensor, rows: Tensor) -> Tensor:
        losses = score(probes).mean(-1)
        return (losses - losses.mean(2, keepdim=True)) / (self.directions - 1) / eps


class LastVisit(TwoSided):
    """One probe, and what each row lost when it was last scored in place of another one (a control variate).

    Args:
        lost: (rows of the task) before the first step.
    """

    def __init__(self, lost: Tensor) -> None:
        self.directions = self.probes = 1
        self._lost = lost

    def __call__(self, score: Score, probes: Tensor, eps: Tensor, rows: Tensor) -> Tensor:
        losses = score(probes)[:, :, 0]
        place = rows[:, None].expand_as(losses)
        if self._lost.ndim == 1:
            self._lost = self._lost.repeat(*losses.shape[:2], 1)
        before = self._lost.gather(2, place)
        self._lost.scatter_(2, place, losses)
        return (losses - before).mean(-1, keepdim=True) / eps


class Curvature(TwoSided):
    """A third probe tells the curvature along the direction; where it is above its average, the step is shorter."""

    def __init__(self) -> None:
        self.directions, self.probes = 1, 3
        self._average: Tensor | None = None

    def __call__(self, score: Score, probes: Tensor, eps: Tensor, rows: Tensor) -> Tensor:
        plus, minus, middle = score(torch.cat([probes, -probes, torch.zeros_like(probes)], 2)).mean(-1).chunk(3, 2)
        here = ((plus + minus - 2 * middle) / eps**2).abs()
        self._average = here if self._average is None else 0.99 * self._average + 0.01 * here
        return (plus - minus) / (2 * eps) * 2 * self._average / (here + self._average)


class Estimate(NamedTuple):
    """gradient (S, G, C, D): `sum_k w_k z_k`, coefficients (S, G, K): the w, directions (S, K, C, D): the z.

    usual (S, G, 1): root mean square of the norm of w in the first steps.
    """

    gradient: Tensor
    coefficients: Tensor
    directions: Tensor
    usual: Tensor


class Sgd:
    scale_free = False
    """Whether the length of a step does not depend on the scale of the losses."""

    def __call__(self, estimate: Estimate, step: int) -> Tensor:
        """(S, G, C, D) the direction of descent."""
        return estimate.gradient


class Momentum(Sgd):
    """Over all bases; the engine's begins anew in each."""

    def __init__(self, beta: float = 0.9) -> None:
        self.beta = beta
        self._mean: Any = 0.0

    def __call__(self, estimate: Estimate, step: int) -> Tensor:
        self._mean = self.beta * self._mean + (1 - self.beta) * estimate.gradient
        return self._mean


class Adam(Momentum):
    scale_free = True
    _square: Any = 0.0

    def __call__(self, estimate: Estimate, step: int) -> Tensor:
        mean = super().__call__(estimate, step) / (1 - self.beta**step)
        self._square = 0.999 * self._square + 0.001 * estimate.gradient.square()
        return mean / ((self._square / (1 - 0.999**step)).sqrt() + 1e-8)


class Meazo(Sgd):
    scale_free = True
    _square: Any = 0.0

    def __call__(self, estimate: Estimate, step: int) -> Tensor:
        self._square = 0.99 * self._square + 0.01 * estimate.coefficients.square().mean(2)
        return estimate.gradient / ((self._square / (1 - 0.99**step)).sqrt() + 1e-8)[..., None, None]


class Sign(Sgd):
    scale_free = True

    def __call__(self, estimate: Estimate, step: int) -> Tensor:
        return estimate.gradient.sign()


class Muon(Sgd):
    scale_free = True

    def __call__(self, estimate: Estimate, step: int) -> Tensor:
        left, values, right = torch.linalg.svd(estimate.gradient, full_matrices=False)
        return left * (values > values.amax(-1, keepdim=True) * 1e-5)[..., None, :] @ right


class Kalman(Sgd):
    """Descent along what all measurements of the last `horizon` steps say of the gradient, each with its noise."""

    def __init__(self, horizon: int) -> None:
        self.horizon = horizon
        self._mean: Any = None

    def __call__(self, estimate: Estimate, step: int) -> Tensor:
        noise = estimate.usual.square()[..., None]
        if self._mean is None:
            self._mean = torch.zeros_like(estimate.gradient)
            self._most = noise / self._mean[0, 0].numel() * torch.ones_like(self._mean)
            self._variance = self._most
        self._variance = torch.minimum(self._variance + self._most / self.horizon, self._most)
        self._mean = self._mean * (1 - 0.5 / self.horizon)
        for k, z in enumerate(estimate.directions.unbind(1)):
            z = z[:, None]
            seen = self._variance * z
            gain = seen / ((seen * z).sum((-1, -2), keepdim=True) + noise)
            measured = estimate.coefficients[:, :, k, None, None] * estimate.directions.shape[1]
            self._mean = self._mean + gain * (measured - (z * self._mean).sum((-1, -2), keepdim=True))
            self._variance = self._variance - gain * seen
        return self._mean * 0.1  # at each step it moves along all directions: a tenth is of the grid's order
