"""`learning_rate="auto"`: a step size measured on the run itself, in units of the probe radius.

A probe moves the weights by eps along a direction. That is far enough to change the loss measurably, and near enough
for the loss to be almost linear. A step moves them by a share of that, the product of the `auto_share` of optimizer and
method, and of REWARD_SHARE where losses are rewards:

    sgd, momentum       lr = share * eps * sqrt(K) / w.   w is the root mean square, over CALIBRATION_STEPS steps, of
                        the norm |w_K| of a step's coefficients: a step is lr * sum_k w_k Z_k, and a probe is eps * Z_k.
                        K directions average the noise of the estimate, so a step may be sqrt(K) times as long.
    scale-free ones     lr = share * eps. The length of their step does not depend on w_K (adam, meazo, sign, muon).

Where several steps see the same completions, they share a walk: GENERATION_WALK. The share is smaller in a long run:
see WALK. Where probes of the method's eps go too far, they come nearer first: FAR.

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

GENERATION_WALK = 4.0
"""Radii that the steps which see the same completions walk, as one walks at random: what is by chance in these is in
all of the steps. SmolLM2-135M, the LM head, 512 steps for each generation of the reward `praise`: with a walk of 1 the
sampled answers earned no more after 16 generations, with 5 they came from .55 to .66 in 14, and with 20 all of them had
become one sentence."""

FAR, NEAR = 0.08, 0.04
"""Nats that a probe moves the loss, root mean square. Beyond FAR the loss is not linear there, and steps as long
unlearn: eps is cut so that it comes to NEAR, and CALIBRATION_STEPS more steps measure with that. Gemma 3 270M, all
layers, eps=1e-3, four tasks and two seeds: it moved it by .095 and more, and runs diverged or unlearnt. With 1e-4 it
moved that of SST-2 by .04, and the validation loss fell from .91 to .70. SmolLM2-135M, five tasks and three seeds: at
most .056 (docs/methods.md)."""

WALK = 15_000
"""Steps times layers that take steps of one eps. The direction of a step is mostly chance, so N steps move the weights
of a layer at random by sqrt(N) of their length, and each layer does its part of the damage. A longer run takes shorter
steps, and walks as far. SmolLM2-135M, all 30 layers, steps of one eps: the training loss of SST-2 fell for 39,000 and
rose from there, and the validation loss was lower with three tenths of the length long before (docs/results.md)."""

MEASURED_WALK, ENOUGH_ROWS = 2_500, 1_000
"""The walk where V is measured (leading.py), with that many training rows or more; with fewer it shrinks with them. All
of such a step moves the outputs, so that its walk shows sooner, and few rows are learnt by heart. In a simulation the
best step size fell as sqrt(N) from there on, on three tasks and two models (docs/methods.md)."""


class StepSize:
    """The base learning rate of a run, which is known from the start or after some steps.

    A resumed run gives the logged coefficients of its earlier steps to `note`, in order.

    Args:
        given: a number, or "auto".
        multiplier: a factor of that number, or of the measured one.
        rewarded: whether the losses are rewards.
        together: steps that see the same completions (`GeneratingObjective.steps_per_generation`), or 1.
    """

    def __init__(
        self,
        method: Method,
        given: float | str,
        multiplier: float = 1.0,
        *,
        rewarded: bool = False,
        together: int = 1,
    ) -> None:
        self._method, self._multiplier = method, multiplier
        self._share = method.auto_step * (REWARD_SHARE if rewarded else min(1.0, GENERATION_WALK / math.sqrt(together)))
        self._may_go_nearer = method.estimator.gives_slopes and not rewarded
        self._given = None if given == AUTO else float(given) * multiplier
        self._squares: list[float] = []
        self.radius = 1.0
        """Of the next step's probes, in units of the method's eps."""

    def expect(self, steps: int, layers: int, rows: int) -> None:
        """Keep the walk of a run of so many steps within WALK, or MEASURED_WALK. To be called before the first `note`.

        Args:
            layers: that the run trains; all that is outside the numbered layers counts as one.
            rows: of the training data.
        """
        walk: float = WALK
        if self._method.coordinates.measures_v:
            walk = MEASURED_WALK * min(1.0, rows / ENOUGH_ROWS)
        self._share = min(self._share, math.sqrt(walk / (steps * layers)))

    @property
    def base(self) -> float | None:
        """The rate; None while it is not known. A step then takes learning rate 0."""
        if self._given is not None:
            return self._given
        length = self._multiplier * self._share * self._eps
        if self._method.optimizer.scale_free:
            return length
        return length / self._norm if len(self._squares) == CALIBRATION_STEPS else None

    @property
    def _eps(self) -> float:
        return self._method.eps * self.radius

    @property
    def _norm(self) -> float:
        # `fsum` rounds once, so the rate does not depend on the order of the sum.
        return math.sqrt(math.fsum(self._squares) / CALIBRATION_STEPS)

    def may_be_known_after(self, steps: int) -> bool:
        """Whether the results of the first `steps` steps may decide the rate. If so, the next step waits for them."""
        return self.base is None and steps >= CALIBRATION_STEPS

    def note(self, coefficients: Sequence[float]) -> None:
        """Record the coefficients of the next step. Steps whose coefficients are all zero do not count."""
        # A step with a loss that was not finite logs zeros: counted, it would make the rate too large.
        if self.base is not None or not (square := math.fsum(c * c for c in coefficients)) > 0.0:
            return
        self._squares.append(square)
        if len(self._squares) < CALIBRATION_STEPS:
            return
        moved = self._eps * self._norm * math.sqrt(self._method.queries)
        if self._may_go_nearer and moved > FAR:
            self._go_nearer(moved)
            return
        logger.info(
            "learning_rate='auto': %.3g (steps of %.2g eps at eps=%g; coefficients of %.3g in %d steps)",
            self.base, self._multiplier * self._share, self._eps, self._norm, CALIBRATION_STEPS,
        )  # fmt: skip

    def _go_nearer(self, moved: float) -> None:
        nearer = float(f"{self._eps * NEAR / moved:.0e}")
        logger.warning(
            "learning_rate='auto': a probe of eps=%g moves the loss by %.2g, too far for its slope to say much; the "
            "next steps measure with eps=%g", self._eps, moved, nearer,
        )  # fmt: skip
        self.radius = nearer / self._method.eps
        self._squares.clear()
