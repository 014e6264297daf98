"""LoZO: low-rank zeroth-order SGD that keeps its right factor for an interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from vllm_zo.methods.base import LowRankMethod
from vllm_zo.methods.coordinates import Coordinates, LeftFactor
from vllm_zo.methods.coordinates.left_factor import LoZOLeft, LoZORight
from vllm_zo.options import option


@dataclass(frozen=True, kw_only=True)
class LoZO(LowRankMethod):
    """Low-rank ZO-SGD that samples V lazily.

        step t:  draw V if t % interval == 0, else keep it;  draw U_k, k = 1..K;  entries N(0, 1)
                 c_k = (L(W + eps U_k V^T) - L(W - eps U_k V^T)) / (2 eps)
                 W  <- W - lr * 1/K sum_k c_k U_k V^T

    All steps of an interval share V, so the update stays in a small accumulator, `U_acc <- U_acc - lr/K sum_k c_k U_k`.
    LOZO-M is `LoZO(optimizer=Momentum(beta=0.9))`. Any other estimator or optimizer may take the place of the default.

    Differences:
        - The official code (optsuite/LOZO, `LOZOtrainer.py`) draws V and U after seeding when it probes on a refresh
          step, but it seeds again and draws U alone for the update. So it moves along a direction that it never probed
          (with interval 1, at every step). Here the update always moves along the probed direction.
        - The paper's estimator divides by the rank. Like the official code we do not, so that published learning rates
          mean the same here.
        - The paper has K = 1. With queries > 1 the estimate is the plain average over K directions, all with the
          step's V.

    Example:
        >>> LoZO(rank=2, interval=50).epoch(120)
        2

    Source: Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures, arXiv:2410.07698.
    """

    name = "lozo"

    v: LoZORight = option(
        "normal",
        choices=get_args(LoZORight),
        panel="Method",
        help="normal, or activations: V spans what enters the LM head most.",
        unsaid=True,
    )
    """"activations" is not the published method: V is measured once, before the first step, from the training rows
    (methods/leading.py). It is for jobs that train the LM head alone, whose inputs do not change."""
    u: LoZOLeft = option(
        "normal",
        choices=get_args(LoZOLeft),
        panel="Method",
        help="normal, or written: rows of U are as large as their tokens are written often.",
        unsaid=True,
    )
    """"written" is not the published method: a row of U is as large as its token is common in what the training rows
    score or, for a reward, in what the base writes for them (methods/written.py). Other rows never move. It is for jobs
    that train the LM head alone."""

    @property
    def coordinates(self) -> Coordinates:
        return LeftFactor(self.rank, u=self.u, v=self.v)
