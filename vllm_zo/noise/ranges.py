"""The elements that a caller asks for, and the counters of the generator that cover them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vllm_zo.noise import philox
from vllm_zo.noise.keys import module_id

WORDS = 4
"""32-bit words of a counter. Each word makes one element."""


@dataclass(frozen=True)
class ElementRanges:
    """Pieces of modules, which lie one after another in a flat vector. Keep the object, because it keeps its tables."""

    ranges: tuple[tuple[str, int, int], ...]
    """(module name, start, stop) of each piece, in elements of the whole module in row-major order."""

    @classmethod
    def of(cls, ranges: Iterable[tuple[str, int, int]]) -> ElementRanges:
        """Make ranges of (module name, start, stop).

        Raises:
            ValueError: a range does not satisfy 0 <= start <= stop.
        """
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
        """The counters that cover each piece. Its first and its last counter may cover elements outside it too."""
        first = [start // WORDS for _, start, _ in self.ranges]
        count = [-(-stop // WORDS) - begin for (_, _, stop), begin in zip(self.ranges, first, strict=True)]
        high = [module_id(name) for name, _, _ in self.ranges]
        return philox.Blocks(np.array(first, np.uint64), np.array(count, np.int64), np.array(high, np.uint64))

    @cached_property
    def take(self) -> Tensor | slice:
        """Selects the pieces' elements among those of the blocks: (total,) int64 indices, or a slice.

        A slice, which copies nothing, is enough if the pieces meet at multiples of four, as they usually do.
        """
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
        """The launch table on each device. `noise.triton` puts it here when it first needs it."""
        return {}
