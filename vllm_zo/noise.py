"""Counter-based noise: a value is a function of (key, module name, element index) and of nothing else.

Generator: Philox4x32-10. One 128-bit counter serves a block of four elements: word j belongs to element 4 * block + j.

    counter   (block low 32, block high 32, id low 32, id high 32), id = 64-bit BLAKE2b of the module's name
    key       (key low 32, key high 32)

Normals, Box-Muller on the words w0..w3 of a block, each read as a signed 32-bit integer and converted to float32:

    u1 = max(|w0|, 1/4) * 2**-31        in (0, 1], so that the logarithm is finite (|normal| <= 6.8)
    n0 = sqrt(-2 log u1) * cos(pi * 2**-31 * w1)
    n1 = sqrt(-2 log u1) * sin(pi * 2**-31 * w1)        and n2, n3 likewise from w2, w3

Properties. Are the numbers the same for...

    any slice of a module, hence any tensor-parallel size and rank     yes
    any set and order of modules asked for together                    yes
    any adapter slot, batch order or engine step                       yes (none is an input)
    any dtype of the consumer                                          yes (float32 here, cast there)
    with numba and without, any number of threads                      yes
    CPU and GPU; any CPU; any version of vLLM, torch, Python           integers yes; normals up to float rounding
    two modules of equal shape                                         no, by design

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123).
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vllm_zo import philox

WORDS = 4
"""32-bit words, hence elements, of a counter."""
_CHUNK = 1 << 16
"""Counters per pass of the float stage: a few hundred kB a tensor, and still enough for torch to use its threads."""


def derive_key(*parts: int | str) -> int:
    """64-bit key of a path such as `(job_seed, "U", step)`. Type and length of each part count: (1, 2) is not (12,)."""
    encoded = b""
    for part in parts:
        body = (part if isinstance(part, str) else str(operator.index(part))).encode()
        encoded += b"%c%d:%b" % (b"s" if isinstance(part, str) else b"i", len(body), body)
    return _hash64(encoded)


def module_id(name: str) -> int:
    """64-bit id of a module in the counter."""
    return _hash64(name.encode())


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class ElementRanges:
    """Which elements of which modules, concatenated flat in this order. Keep the object: its tables are built once."""

    ranges: tuple[tuple[str, int, int], ...]
    """(module name, start, stop) of each piece, in elements of the whole module in row-major order."""

    @classmethod
    def of(cls, ranges: Iterable[tuple[str, int, int]]) -> ElementRanges:
        """Raises ValueError for a range that does not satisfy 0 <= start <= stop."""
        pieces = tuple((name, int(start), int(stop)) for name, start, stop in ranges)
        for name, start, stop in pieces:
            if not 0 <= start <= stop:
                raise ValueError(f"range {start}:{stop} of module {name!r}: expected 0 <= start <= stop")
        return cls(pieces)

    @cached_property
    def counts(self) -> list[int]:
        """Elements of each piece."""
        return [stop - start for _, start, stop in self.ranges]

    @cached_property
    def total(self) -> int:
        """Elements of all pieces together."""
        return sum(self.counts)

    @cached_property
    def blocks(self) -> philox.Blocks:
        """Counters that cover each piece; the first and the last may serve it only in part."""
        first = [start // WORDS for _, start, _ in self.ranges]
        count = [-(-stop // WORDS) - begin for (_, _, stop), begin in zip(self.ranges, first, strict=True)]
        high = [module_id(name) for name, _, _ in self.ranges]
        return philox.Blocks(np.array(first, np.uint64), np.array(count, np.int64), np.array(high, np.uint64))

    @cached_property
    def take(self) -> Tensor | slice:
        """Which of the blocks' values belong to the pieces: a slice where pieces meet at multiples of four (the usual
        case), else (total,) int64 indices."""
        lead = [start % WORDS for _, start, _ in self.ranges]
        tail = [stop % WORDS for _, _, stop in self.ranges]
        if not any(lead[1:]) and not any(tail[:-1]):
            offset = lead[0] if lead else 0
            return slice(offset, offset + self.total)
        ends = WORDS * self.blocks.count.cumsum()
        begins = ends - WORDS * self.blocks.count + lead
        return torch.cat(
            [torch.arange(b, b + n, device="cpu") for b, n in zip(begins.tolist(), self.counts, strict=True)]
        )

    @cached_property
    def device_tables(self) -> dict[torch.device, Tensor]:
        """The launch table of `triton_noise` on each device, filled there."""
        return {}


def normal(key: int, ranges: ElementRanges, device: torch.device | str) -> Tensor:
    """(total,) float32, independent standard normals.

    Args:
        key: unsigned 64-bit integer, as `derive_key` makes; ValueError for any other.
    """
    device = _checked(key, device)
    if device.type == "cuda":
        return _triton(key, ranges, device, torch.float32)
    words = philox.words(key, ranges.blocks)
    out = torch.empty(words.shape[1], WORDS, dtype=torch.float32, device="cpu")
    for start in range(0, len(out), _CHUNK):
        _box_muller(words[:, start : start + _CHUNK], out[start : start + _CHUNK])
    return out.view(-1)[ranges.take].to(device)


def add_normals(
    theta_N: Tensor, keys: Sequence[int], weights_K: Tensor, factor: float, ranges: ElementRanges
) -> Tensor:
    """`theta + sum_k factor * weights_k * normal(key_k)`, out of place, in float32 and in the order of k.

    On a GPU in one launch that keeps no noise. CPU and GPU agree to the noise (module's docstring) and to the rounding
    of each product and sum; on one kind of machine the bits are always the same.

    Args:
        theta_N: (total,) float32. weights_K: (K,) float32, on the same device.
    """
    if theta_N.device.type == "cuda":
        from vllm_zo.worker.kernels.triton_noise import add

        return add(theta_N, keys, weights_K, factor, ranges)
    for key, weight in zip(keys, weights_K.unbind(), strict=True):
        theta_N = add_scaled(theta_N, normal(key, ranges, theta_N.device), weight, factor)
    return theta_N


def add_scaled(theta_N: Tensor, values_N: Tensor, weight: Tensor, factor: float) -> Tensor:
    """`theta + factor * weight * values`; `weight` is a number on the device."""
    return torch.addcmul(theta_N, values_N, weight.expand_as(values_N), value=factor)


def uniform_int32(key: int, ranges: ElementRanges, device: torch.device | str) -> Tensor:
    """(total,) int32, uniform: the 32 bits of `uniform_bits` read as signed, in half the memory."""
    device = _checked(key, device)
    if device.type == "cuda":
        return _triton(key, ranges, device, torch.int32)
    return philox.interleaved(philox.words(key, ranges.blocks))[ranges.take].to(device)


def uniform(key: int, ranges: ElementRanges, device: torch.device | str) -> Tensor:
    """(total,) float32, uniform in [-1, 1]."""
    return uniform_int32(key, ranges, device).to(torch.float32).mul_(2.0**-31)


def rademacher(key: int, ranges: ElementRanges, device: torch.device | str) -> Tensor:
    """(total,) float32, +1 or -1 with equal probability."""
    return (uniform_int32(key, ranges, device) >= 0).to(torch.float32).mul_(2.0).sub_(1.0)


def uniform_bits(key: int, ranges: ElementRanges, device: torch.device | str) -> Tensor:
    """(total,) int64 in [0, 2**32), uniform."""
    return uniform_int32(key, ranges, device).to(torch.int64).bitwise_and_(0xFFFFFFFF)


def _checked(key: int, device: torch.device | str) -> torch.device:
    if not 0 <= key < 1 << 64:
        raise ValueError(f"key={key}: expected an unsigned 64-bit integer; make one with derive_key")
    return torch.device(device)


def _triton(key: int, ranges: ElementRanges, device: torch.device, dtype: torch.dtype) -> Tensor:
    from vllm_zo.worker.kernels.triton_noise import fill  # triton is there on GPU machines only

    return fill(key, ranges, device, dtype)


def _box_muller(words: Tensor, out: Tensor) -> None:
    """(4, n) int32 words -> `out`, (n, 4) float32 normals. The formula is in the module's docstring."""
    floats = words.to(torch.float32)
    for pair in (0, 2):
        radius = floats[pair].abs_().clamp_(min=0.25).mul_(2.0**-31).log_().mul_(-2.0).sqrt_()
        angle = floats[pair + 1].mul_(math.pi * 2.0**-31)
        torch.mul(radius, angle.cos(), out=out[:, pair])
        torch.mul(radius, angle.sin_(), out=out[:, pair + 1])
