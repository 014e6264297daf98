"""Philox4x32-10 on a CPU, the integer stage of `noise`, in two implementations that give the same integers.

numba (a dependency of vLLM) compiles the plain loop to vector code: 0.15 ms for the 41,472 counters of an OPT-125M step
at rank 2, on one EPYC core. torch takes 2.7 ms, because it streams each of some hundred operations through memory. The
torch implementation serves where numba cannot be imported.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""These three are Philox's own constants: other values give other noise, and old logs no longer replay."""
_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Blocks:
    """Runs of consecutive counters. Counter i of a run has the low 64 bits `first + i` and the high 64 bits `high`."""

    first: np.ndarray  # (pieces,) uint64
    count: np.ndarray  # (pieces,) int64
    high: np.ndarray  # (pieces,) uint64


def words(key: int, blocks: Blocks) -> Tensor:
    """The words of each counter, (4, sum of counts) int32: their 32 bits read as signed.

    Args:
        key: unsigned 64-bit integer.
    """
    loops = _numba_loops()
    if loops is None:
        return words_torch(key, blocks)
    # On the CPU explicitly: numba needs host memory, whatever torch's default device is.
    out = torch.empty(4, int(blocks.count.sum()), dtype=torch.int32, device="cpu")
    loops.fill(np.uint64(key), blocks.first, blocks.count, blocks.high, out.numpy().view(np.uint32))
    return out


def interleaved(planes: Tensor) -> Tensor:
    """The result of `words` in the order of elements: (4, n) -> (4 n,)."""
    loops = _numba_loops()
    if loops is None:
        return planes.T.reshape(-1)
    out = torch.empty(planes.numel(), dtype=planes.dtype, device="cpu")
    loops.interleave(planes.numpy(), out.numpy())
    return out


def words_torch(key: int, blocks: Blocks) -> Tensor:
    """`words` in plain torch."""
    # torch lacks most operations on uint64. int64 does as well: a product's 64 bits are the same, signed or not, and
    # the masks remove what a shift of a negative number brings in.
    count = torch.from_numpy(blocks.count)
    starts = count.cumsum(0) - count
    base = torch.from_numpy(blocks.first.view(np.int64)) - starts
    counter = torch.arange(int(count.sum()), device="cpu") + base.repeat_interleave(count)
    high = torch.from_numpy(blocks.high.view(np.int64)).repeat_interleave(count)
    c0, c1, c2, c3 = counter & _MASK32, counter >> 32 & _MASK32, high & _MASK32, high >> 32 & _MASK32
    key0, key1 = key & _MASK32, key >> 32
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(key0).bitwise_and_(_MASK32)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(key1).bitwise_and_(_MASK32)
        c1, c3 = p1 & _MASK32, p0 & _MASK32
        key0, key1 = (key0 + WEYL[0]) & _MASK32, (key1 + WEYL[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3)).to(torch.int32)


class _Loops(NamedTuple):
    fill: Callable[..., None]
    interleave: Callable[..., None]


@cache
def _numba_loops() -> _Loops | None:
    """The compiled loops; None without numba. A loop's first call in a process compiles it, in about a second."""
    try:
        from numba import njit
    except ImportError as error:
        logger.info("Philox noise in torch, about ten times slower: numba cannot be imported (%s)", error)
        return None
    logger.info("Philox noise compiled by numba")
    # nogil: vLLM's threads for sockets go on while noise is drawn.
    return _Loops(njit(nogil=True)(_fill), njit(nogil=True)(_interleave))


def _fill(key, first, count, high, out):  # type: ignore[no-untyped-def]
    """Write the words of all blocks to `out`, (4, n) uint32. numba compiles this loop."""
    # Every constant is typed: numba makes a float of a uint64 beside a signed literal. Each word has an array of its
    # own, so that LLVM stores vectors: writing to one array (n, 4) is five times slower.
    shift, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    multiplier0, multiplier1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    weyl0, weyl1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
    end = 0
    for piece in range(first.size):
        start, end = end, end + count[piece]
        out0, out1, out2, out3 = out[0, start:end], out[1, start:end], out[2, start:end], out[3, start:end]
        high0, high1 = np.uint32(high[piece] & mask), np.uint32(high[piece] >> shift)
        for i in range(count[piece]):
            counter = first[piece] + np.uint64(i)
            c0, c1, c2, c3 = np.uint32(counter & mask), np.uint32(counter >> shift), high0, high1
            key0, key1 = np.uint32(key & mask), np.uint32(key >> shift)
            for _ in range(10):
                p0, p1 = np.uint64(c0) * multiplier0, np.uint64(c2) * multiplier1
                c0, c1 = np.uint32(p1 >> shift) ^ c1 ^ key0, np.uint32(p1 & mask)
                c2, c3 = np.uint32(p0 >> shift) ^ c3 ^ key1, np.uint32(p0 & mask)
                key0, key1 = np.uint32(key0 + weyl0), np.uint32(key1 + weyl1)
            out0[i], out1[i], out2[i], out3[i] = c0, c1, c2, c3


def _interleave(planes, out):  # type: ignore[no-untyped-def]
    """Write planes (4, n) to `out`, (4 n,), element by element. numba compiles this loop; it takes a tenth of the time
    in which torch copies a transposed (4, n)."""
    plane0, plane1, plane2, plane3 = planes[0], planes[1], planes[2], planes[3]
    for i in range(planes.shape[1]):
        out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3] = plane0[i], plane1[i], plane2[i], plane3[i]
