"""V from what enters a module: its leading directions, each as large as the others.

The gradient of a linear layer lies in the span of its inputs, and few directions hold most of these. A random V looks
at all directions alike, and a step along it at whichever input direction is largest. Here V spans the leading
directions, and is divided by what the inputs have along each ("whitened"), so that none hides the others, and a probe
moves the outputs as far in every model.

Source: the span of the inputs for zeroth-order steps: AGZO, arXiv:2601.17261; ZO-Act, arXiv:2607.01125. They take it
anew for each batch; ours is measured once, from all rows, because the inputs of the module do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.errors import JobError
from vllm_zo.methods.linear_algebra import orthonormal

SMALLEST = 1e-6
"""Of the largest mean square. Directions with less are rounding of 16-bit inputs, and divided by it they would be all
that a step sees."""

OUTPUT = 40.0
"""Root mean square of the entries of V^T x: a probe of rank R moves an output by `eps * sqrt(R) * OUTPUT`, .06 with the
defaults. It is the length of what enters the head of SmolLM2, with which `learning_rate="auto"` was measured for such
jobs. Gemma 3's is 150: a V as large as that made steps that learnt nothing (docs/methods.md)."""


class Inputs:
    """The rows that enter a module, as their second moment. It adds and decomposes in float64.

    Args:
        features: of a row (I).
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self._moment_II = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, rows_TI: Tensor) -> None:
        rows = rows_TI.double()
        self._moment_II += rows.T @ rows
        self.rows += len(rows)

    def leading(self, count: int, key: int) -> Tensor:
        """(I, count) float32: V^T x has `count` uncorrelated entries, each with root mean square OUTPUT.

        The columns are random mixtures of the leading directions, so that every basis has its share of each.

        Args:
            key: of the mixture.

        Raises:
            JobError: the rows have fewer directions.
        """
        values, vectors = torch.linalg.eigh(self._moment_II)
        values, vectors = values.flip(0), vectors.flip(1)
        directions = int((values > values[0] * SMALLEST).sum()) if self.rows else 0
        if count > directions:
            raise JobError(
                f"v='activations': bases * rank = {count}, and the {self.rows} inputs that were measured have "
                f"{directions} directions; set bases so that it is at most {directions}, or give more rows."
            )
        sizes = OUTPUT * (self.rows / values[:count]).sqrt()
        square = noise.ElementRanges.of([("mixture", 0, count * count)])
        mixture = orthonormal(noise.normal(key, square, self._moment_II.device).view(count, count))
        return ((vectors[:, :count] * _upright(vectors[:, :count]) * sizes) @ mixture.double()).float()


def _upright(vectors_IC: Tensor) -> Tensor:
    """(C,) +1 or -1, so that the largest entry of each column is positive: LAPACK may choose any sign."""
    largest = vectors_IC.gather(0, vectors_IC.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0)
