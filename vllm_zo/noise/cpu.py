"""`noise` on a CPU: `philox` makes the integers, and torch makes normals of them by Box-Muller."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_zo.noise import philox
from vllm_zo.noise.ranges import WORDS, ElementRanges

_CHUNK = 1 << 16
"""Counters that `_box_muller` handles at a time. A tensor then takes a few hundred kB, which stays in the cache, and is
large enough for torch to use its threads."""


def fill(key: int, ranges: ElementRanges, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(total,) standard normals if `dtype` is float32, or the integers of `noise.uniform_int32` if it is int32."""
    words = philox.words(key, ranges.blocks)
    if dtype == torch.int32:
        return philox.interleaved(words)[ranges.take].to(device)
    out = torch.empty(words.shape[1], WORDS, dtype=torch.float32, device="cpu")
    for start in range(0, len(out), _CHUNK):
        _box_muller(words[:, start : start + _CHUNK], out[start : start + _CHUNK])
    return out.view(-1)[ranges.take].to(device)


def add(theta_N: Tensor, keys: Sequence[int], weights_K: Tensor, factor: float, ranges: ElementRanges) -> Tensor:
    """See `noise.add_normals`."""
    for key, weight in zip(keys, weights_K.unbind(), strict=True):
        theta_N = add_scaled(theta_N, fill(key, ranges, theta_N.device, torch.float32), weight, factor)
    return theta_N


def add_scaled(theta_N: Tensor, values_N: Tensor, weight: Tensor, factor: float) -> Tensor:
    """`theta + factor * weight * values`, (N,). weight: a tensor with one number, which is never read by the host."""
    return torch.addcmul(theta_N, values_N, weight.expand_as(values_N), value=factor)


def _box_muller(words: Tensor, out: Tensor) -> None:
    """Make normals, `out` (n, 4) float32, of words (4, n) int32. The formula is in the docstring of `vllm_zo.noise`."""
    floats = words.to(torch.float32)
    for pair in (0, 2):
        radius = floats[pair].abs_().clamp_(min=0.25).mul_(2.0**-31).log_().mul_(-2.0).sqrt_()
        angle = floats[pair + 1].mul_(math.pi * 2.0**-31)
        torch.mul(radius, angle.cos(), out=out[:, pair])  # before `sin_`, which overwrites the angle
        torch.mul(radius, angle.sin_(), out=out[:, pair + 1])
