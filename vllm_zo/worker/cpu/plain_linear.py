"""Products with a plain float32 weight, which a job in `fold` changes as it trains.

torch multiplies with MKL. On an AMD CPU with AVX-512 that uses the instructions of AVX2 only, and oneDNN, which torch
has too and which takes the plain weight as it is, needs half the time. On a CPU with AVX2 oneDNN is the slower one
(docs/performance.md). So the worker measures both, once.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`x W^T + bias`. x: (..., I), weight: (O, I), bias: (O,) -> (..., O)."""

MIN_TOKENS = 16
"""With fewer tokens and a small weight torch's product is the faster one everywhere (measured at 256 features)."""
MUCH_FASTER = 0.75
"""oneDNN is taken if it needs at most this share of MKL's time: .45 with AVX-512 on AMD, above 1 with AVX2. Far from
both, so that one engine does not choose differently from the next, whose losses would differ by rounding."""
TOKENS, FEATURES, REPEATS = 256, 512, 5
"""What is measured: some milliseconds in all."""


@functools.cache
def plain_linear() -> Linear:
    """The product for plain float32 weights on this machine, with as many threads as torch has now."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return F.linear
    return fastest(_seconds(F.linear), _seconds(onednn_linear))


def fastest(mkl_seconds: float, onednn_seconds: float) -> Linear:
    """The product to take, from what both need."""
    return onednn_linear if onednn_seconds <= MUCH_FASTER * mkl_seconds else F.linear


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by oneDNN, without packing the weight; by torch itself for a few tokens. float32."""
    if x.numel() < MIN_TOKENS * x.shape[-1]:
        return F.linear(x, weight, bias)
    # Private: torch's compiler writes this operator into the graphs that it makes.
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _seconds(linear: Linear) -> float:
    """The shortest time of some calls."""
    x, weight = torch.ones(TOKENS, FEATURES), torch.ones(FEATURES, FEATURES)
    linear(x, weight, None)  # it builds its kernel

    def once() -> float:
        start = time.perf_counter()
        linear(x, weight, None)
        return time.perf_counter() - start

    return min(once() for _ in range(REPEATS))
