"""`learning_rate="auto"`: a step size measured on the run itself, in units of the probe radius.

A probe moves the weights by eps along a direction, far enough to be felt and near enough for the loss to be almost
straight. A step is made to move them by a share of that, the `auto_share` of optimizer and method:

    sgd and its like    lr = share * eps * sqrt(K) / w,   w the root mean square, over CALIBRATION_STEPS steps, of the
                        norm |w_K| of a step's coefficients: the step is lr * sum_k w_k Z_k, and a probe is eps * Z_k.
                        K directions average the noise of the estimate, so that the step may be sqrt(K) times as long
    scale-free ones     lr = share * eps: the length of their step does not depend on w_K (adam, meazo, sign, muon)

The coefficients come from the first steps of the run, which are taken with learning rate 0. The result is a function of
logged coefficients alone: a resumed run finds the same one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from vllm_zo.methods.base import Method

logger = logging.getLogger("vllm.zo")

AUTO = "auto"
CALIBRATION_STEPS = 10
"""Steps of learning rate 0: the mean square of 10 projected gradients is known to about 45 %, the step size to 20 %."""


class StepSize:
    """The base learning rate of a run, known from the start or after some steps.

    Args:
        given: a number, or "auto".
        multiplier: factor of it.
        logged: coefficients of the steps that a resumed run has taken already.
    """

    def __init__(self, method: Method, given: float | str, multiplier: float = 1.0) -> None:
        self._method, self._multiplier = method, multiplier
        self._squares: list[float] = []
        self.base: float | None = None
        """None: not known yet; the next step takes learning rate 0, once the results of all before it are in."""
        if given != AUTO:
            self.base = float(given) * multiplier
        elif method.optimizer.scale_free:
            self.base = multiplier * method.auto_step * method.eps

    def may_be_known_after(self, steps: int) -> bool:
        """Whether the results of the first `steps` steps may decide it: those must be in before the next is made."""
        return self.base is None and steps >= CALIBRATION_STEPS

    def note(self, coefficients: Sequence[float]) -> None:
        """The coefficients of the next step, in order. Steps that say nothing (all zero) do not count."""
        if self.base is not None or not (square := math.fsum(c * c for c in coefficients)) > 0.0:
            return
        self._squares.append(square)
        if len(self._squares) == CALIBRATION_STEPS:
            norm = math.sqrt(math.fsum(self._squares) / CALIBRATION_STEPS)
            method = self._method
            share = self._multiplier * method.auto_step
            self.base = share * method.eps / norm
            logger.info(
                "learning_rate='auto': %.3g (steps of %.2g eps at eps=%g; coefficients of %.3g in %d steps)",
                self.base, share, method.eps, norm, CALIBRATION_STEPS,
            )  # fmt: skip
