"""Counter-based noise: a value is a function of (key, module name, element index) and of nothing else.

The generator is Philox4x32-10. One 128-bit counter serves a block of four elements: word j belongs to element
4 * block + j.

    counter   (block low 32, block high 32, id low 32, id high 32), id = 64-bit BLAKE2b of the module's name
    key       (key low 32, key high 32)

Normals come from Box-Muller on the words w0..w3 of a block, each read as a signed 32-bit integer and converted to
float32:

    u1 = max(|w0|, 1/4) * 2**-31        in (0, 1], so that the logarithm is finite (|normal| <= 6.8)
    n0 = sqrt(-2 log u1) * cos(pi * 2**-31 * w1)
    n1 = sqrt(-2 log u1) * sin(pi * 2**-31 * w1)        and n2, n3 likewise from w2, w3

Are the numbers the same for...

    any slice of a module, so any tensor-parallel size and rank        yes
    any set and order of modules asked for together                    yes
    any adapter slot, batch order or engine step                       yes (none is an input)
    any dtype of the consumer                                          yes (float32 here, cast there)
    with numba and without, any number of threads                      yes
    CPU and GPU; any CPU; any version of vLLM, torch, Python           integers yes; normals up to float rounding
    two modules of equal shape                                         no, by design

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from vllm_zo.noise import cpu
from vllm_zo.noise.cpu import add_scaled
from vllm_zo.noise.keys import derive_key, derive_seed, module_id
from vllm_zo.noise.ranges import ElementRanges

__all__ = [
    "ElementRanges",
    "add_normals",
    "add_scaled",
    "derive_key",
    "derive_seed",
    "module_id",
    "normal",
    "rademacher",
    "uniform",
    "uniform_bits",
    "uniform_int32",
    "warm_up",
]


def warm_up() -> None:
    """Compile the CPU's loops. This takes over a second, for which the first step would otherwise wait."""
    ranges = ElementRanges.of([("warm-up", 0, 4)])
    normal(0, ranges, "cpu")
    uniform_int32(0, ranges, "cpu")


def normal(key: int, ranges: ElementRanges, device: torch.device | str) -> Tensor:
    """Independent standard normals, (total,) float32.

    Args:
        key: unsigned 64-bit integer, as `derive_key` makes.
        ranges: the elements.
        device: of the result.

    Raises:
        ValueError: `key` is out of range.
    """
    return _fill(key, ranges, device, torch.float32)


def add_normals(
    theta_N: Tensor, keys: Sequence[int], weights_K: Tensor, factor: float, ranges: ElementRanges
) -> Tensor:
    """`theta + sum_k factor * weights_k * normal(key_k)`, out of place, in float32 and in the order of k.

    On a GPU this is one launch that stores no noise. CPU and GPU differ by the rounding of the normals (see the
    module's docstring) and of each product and sum. On one kind of machine the bits are always the same.

    Args:
        theta_N: (total,) float32.
        keys: K keys, as `derive_key` makes.
        weights_K: (K,) float32, on the device of `theta_N`.
        factor: multiplies every weight.
        ranges: the elements.

    Returns:
        (total,) float32.
    """
    added: Tensor = _backend(theta_N.device).add(theta_N, keys, weights_K, factor, ranges)
    return added


def uniform_int32(key: int, ranges: ElementRanges, device: torch.device | str) -> Tensor:
    """Uniform (total,) int32: the 32 bits of `uniform_bits` read as signed, in half the memory.

    Raises:
        ValueError: `key` is out of range.
    """
    return _fill(key, ranges, device, torch.int32)


def uniform(key: int, ranges: ElementRanges, device: torch.device | str) -> Tensor:
    """Uniform in [-1, 1], (total,) float32. Raises ValueError for a key out of range."""
    return uniform_int32(key, ranges, device).to(torch.float32).mul_(2.0**-31)


def rademacher(key: int, ranges: ElementRanges, device: torch.device | str) -> Tensor:
    """+1 or -1 with equal probability, (total,) float32. Raises ValueError for a key out of range."""
    return (uniform_int32(key, ranges, device) >= 0).to(torch.float32).mul_(2.0).sub_(1.0)


def uniform_bits(key: int, ranges: ElementRanges, device: torch.device | str) -> Tensor:
    """Uniform (total,) int64 in [0, 2**32). Raises ValueError for a key out of range."""
    return uniform_int32(key, ranges, device).to(torch.int64).bitwise_and_(0xFFFFFFFF)


def _fill(key: int, ranges: ElementRanges, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    if not 0 <= key < 1 << 64:
        raise ValueError(f"key={key}: expected an unsigned 64-bit integer; make one with derive_key")
    device = torch.device(device)
    filled: Tensor = _backend(device).fill(key, ranges, device, dtype)
    return filled


def _backend(device: torch.device) -> ModuleType:
    """`triton` for a GPU; `cpu`, which copies its results, for other devices. Both have `fill` and `add`."""
    if device.type != "cuda":
        return cpu
    from vllm_zo.noise import triton  # not at the top: machines without a GPU may have no Triton

    return triton
