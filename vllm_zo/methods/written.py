"""Sizes of U's rows from what is written: each row of the LM head moves as much as its token is common.

A probe of the LM head moves the logits of the whole vocabulary. Of its tokens a model writes some hundred for a given
kind of prompt. The others cannot earn a reward, but each step moves them too, and at random: a step that helps the
tokens that are written lifts tens of thousands that are not, until sampling finds them. The gradient of the expected
reward has a row for each token, whose mean square grows with the probability p of the token like p (1 - p). Here the
rows of a direction have about that size: the square root of the share of a token among the base's own completions.

Where a loss scores labels or texts, it is the share among the tokens that the training rows score. All labels then have
size 1, and an adapter leaves every other word as it was.

Source: own. Measured in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_sizes(counts: Sequence[tuple[int, int]], rows: int, device: torch.device | str = "cpu") -> Tensor:
    """(rows,) float32: the square root of each token's count, 1 for the token that was written most.

    Args:
        counts: (token, how often it was written), without repetition.
        rows: of the LM head.
    """
    sizes = torch.zeros(rows, dtype=torch.float64)
    sizes[[token for token, _ in counts]] = torch.tensor([float(count) for _, count in counts], dtype=torch.float64)
    return (sizes / sizes.max()).sqrt().float().to(device)
