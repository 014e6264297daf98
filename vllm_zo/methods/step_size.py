"""`learning_rate="auto"`: a step size measured on the run itself, in units of the probe radius.

A probe moves the weights by eps along a direction. That is far enough to change the loss measurably, and near enough
for the loss to be almost linear. A step moves them by a share of that, the product of the `auto_share` of optimizer and
method, and of REWARD_SHARE where losses are rewards:

    sgd, momentum       lr = share * eps * sqrt(K) / w.   w is the root mean square, over CALIBRATION_STEPS steps, of
                        the norm |w_K| of a step's coefficients: a step is lr * sum_k w_k Z_k, and a probe is eps * Z_k.
                        K directions average the noise of the estimate, so a step may be sqrt(K) times as long.
    scale-free ones     lr = share * eps. The length of their step does not depend on w_K (adam, meazo, sign, muon).

The coefficients come from the first steps of the run, which have learning rate 0. The step size is a function of logged
coefficients alone, so a resumed run finds the same one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from vllm_zo.methods.base import Method

logger = logging.getLogger("vllm.zo")

AUTO = "auto"
CALIBRATION_STEPS = 10
"""Steps of learning rate 0. The mean square of n normals has a relative error of sqrt(2/n): with 10 it is known to
about 45 %, and the step size, which goes with its root, to about 20 %."""

REWARD_SHARE = 0.15
"""What a probe earns is mostly chance: a step is short, or it is a walk at random. In a simulation of the reward of
docs/results.md six of six seeds kept what they had learnt at .15, three of six at .3, and none at 1."""


class StepSize:
    """The base learning rate of a run, which is known from the start or after some steps.

    A resumed run gives the logged coefficients of its earlier steps to `note`, in order.

    Args:
        given: a number, or "auto".
        multiplier: a factor of that number, or of the measured one.
        rewarded: whether the losses are rewards.
    """

    def __init__(self, method: Method, given: float | str, multiplier: float = 1.0, *, rewarded: bool = False) -> None:
        self._method = method
        self._share = multiplier * method.auto_step * (REWARD_SHARE if rewarded else 1.0)
        self._squares: list[float] = []
        self.base: float | None = None
        """None while the rate is not known. A step then takes learning rate 0."""
        if given != AUTO:
            self.base = float(given) * multiplier
        elif method.optimizer.scale_free:
            self.base = self._share * method.eps

    def may_be_known_after(self, steps: int) -> bool:
        """Whether the results of the first `steps` steps may decide the rate. If so, the next step waits for them."""
        return self.base is None and steps >= CALIBRATION_STEPS

    def note(self, coefficients: Sequence[float]) -> None:
        """Record the coefficients of the next step. Steps whose coefficients are all zero do not count."""
        # A step with a loss that was not finite logs zeros: counted, it would make the rate too large.
        # `fsum` rounds once, so the rate does not depend on the order of the sum.
        if self.base is not None or not (square := math.fsum(c * c for c in coefficients)) > 0.0:
            return
        self._squares.append(square)
        if len(self._squares) == CALIBRATION_STEPS:
            norm = math.sqrt(math.fsum(self._squares) / CALIBRATION_STEPS)
            method, share = self._method, self._share
            self.base = share * method.eps / norm
            logger.info(
                "learning_rate='auto': %.3g (steps of %.2g eps at eps=%g; coefficients of %.3g in %d steps)",
                self.base, share, method.eps, norm, CALIBRATION_STEPS,
            )  # fmt: skip
