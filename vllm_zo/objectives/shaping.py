"""Rewards to losses: what the probes of a group make of each other's rewards on the same prompt.

Shape suffixes: P probes, E examples (prompts).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def plain(rewards_PE: Tensor) -> Tensor:
    """As they are."""
    return rewards_PE


def baseline(rewards_PE: Tensor) -> Tensor:
    """Less the prompt's mean over the probes. It cancels in a difference of two signs; one-sided estimators gain."""
    return rewards_PE - rewards_PE.mean(0)


def zscore(rewards_PE: Tensor) -> Tensor:
    """Less the prompt's mean, over its (population) standard deviation; 0 where all probes got the same.

    Every prompt then has the same say, however wide its rewards are. With two probes it is a vote: +1 and -1.

    Source: GRPO's advantage, arXiv:2402.03300; ES with normalised fitness, arXiv:2509.24372.
    """
    centred = rewards_PE - rewards_PE.mean(0)
    spread = rewards_PE.std(0, correction=0)
    return torch.where(spread > 0, centred / spread, 0.0)


def rank(rewards_PE: Tensor) -> Tensor:
    """Centred ranks in [-0.5, 0.5] among the probes of a prompt, ties sharing theirs; no outlier weighs more than 0.5.

    Source: Salimans et al. 2017, arXiv:1703.03864, section 2.1 ("fitness shaping").
    """
    ours_P1E, theirs_1PE = rewards_PE[:, None], rewards_PE[None]
    below_PE = (theirs_1PE < ours_P1E).sum(1) + 0.5 * ((theirs_1PE == ours_P1E).sum(1) - 1)
    return below_PE / (len(rewards_PE) - 1) - 0.5


SHAPINGS: dict[str, Callable[[Tensor], Tensor]] = {"none": plain, "baseline": baseline, "zscore": zscore, "rank": rank}


def shape(rewards_PE: Tensor, shaping: str) -> Tensor:
    """Shaped rewards; a single probe (an evaluation) has nothing to be compared with and keeps its own."""
    return rewards_PE if len(rewards_PE) == 1 else SHAPINGS[shaping](rewards_PE)
