"""Shaping: how the rewards that the probes of a group get for one prompt change each other, before they become losses.

Shape suffixes: P probes, E examples (prompts).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def plain(rewards_PE: Tensor) -> Tensor:
    """The rewards as they are."""
    return rewards_PE


def baseline(rewards_PE: Tensor) -> Tensor:
    """The rewards minus their mean over the probes, prompt by prompt.

    The mean cancels in a two-sided difference. One-sided estimators gain from it.
    """
    return rewards_PE - rewards_PE.mean(0)


def zscore(rewards_PE: Tensor) -> Tensor:
    """The rewards minus the prompt's mean, divided by its (population) standard deviation; 0 if all are equal.

    Every prompt then has the same weight, however wide its rewards are. With two probes it is a vote: +1 and -1.

    Source: GRPO's advantage, arXiv:2402.03300; ES with normalised fitness, arXiv:2509.24372.
    """
    centred = rewards_PE - rewards_PE.mean(0)
    spread = rewards_PE.std(0, correction=0)
    return torch.where(spread > 0, centred / spread, 0.0)


def rank(rewards_PE: Tensor) -> Tensor:
    """The centred ranks in [-0.5, 0.5] among the probes of a prompt. Ties share their rank; no outlier exceeds 0.5.

    Source: Salimans et al. 2017, arXiv:1703.03864, section 2.1 ("fitness shaping").
    """
    ours_P1E, theirs_1PE = rewards_PE[:, None], rewards_PE[None]
    # Minus 1: every probe equals itself.
    below_PE = (theirs_1PE < ours_P1E).sum(1) + 0.5 * ((theirs_1PE == ours_P1E).sum(1) - 1)
    return below_PE / (len(rewards_PE) - 1) - 0.5


SHAPINGS: dict[str, Callable[[Tensor], Tensor]] = {"none": plain, "baseline": baseline, "zscore": zscore, "rank": rank}


def shape(rewards_PE: Tensor, shaping: str) -> Tensor:
    """(P, E) the shaped rewards. A single probe (an evaluation) keeps its own, because it has no other to compare
    with."""
    return rewards_PE if len(rewards_PE) == 1 else SHAPINGS[shaping](rewards_PE)
