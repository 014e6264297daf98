"""LoZO: low-rank zeroth-order SGD whose right factor is kept for an interval."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_zo.methods.base import LowRankMethod


@dataclass(frozen=True, kw_only=True)
class LoZO(LowRankMethod):
    """Low-rank ZO-SGD with lazy sampling of V.

        step t:  V drawn if t % interval == 0, else kept;  U_k fresh, k = 1..K;  entries N(0, 1)
                 c_k = (L(W + eps U_k V^T) - L(W - eps U_k V^T)) / (2 eps)
                 W  <- W - lr * 1/K sum_k c_k U_k V^T

    V is shared inside an interval, so the update stays in a small accumulator, `U_acc <- U_acc - lr/K sum_k c_k U_k`.
    LOZO-M is `LoZO(optimizer=Momentum(beta=0.9))`; any estimator and any optimizer may take the place of its own.

    Where this differs:
        - from the official code (optsuite/LOZO, `LOZOtrainer.py`): there, on a refresh step, the probe draws V and U
          after seeding, but the update seeds again and draws U alone: it moves along a direction that was never probed
          (with interval 1: at every step). Here the direction applied is the direction probed, always.
        - from the paper's estimator, which divides by the rank: like the official code we do not, so that published
          learning rates mean the same here.
        - queries > 1 is the plain average over K directions, all with the step's V (the paper has K = 1).

    Example:
        >>> LoZO(rank=2, interval=50).epoch(120)
        2

    Source: Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures, arXiv:2410.07698.
    """

    name = "lozo"
