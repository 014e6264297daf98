"""Where the numbers of each module lie in the flat vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.plan import ModuleShape


@dataclass(frozen=True)
class FactorLayout:
    """Where the factors of each module lie in the flat vectors of U (sum of O*R) and V (sum of I*R)."""

    modules: tuple[ModuleShape, ...]
    rank: int
    _ranges: dict[tuple[int, ...], noise.ElementRanges] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def u_ranges(self) -> noise.ElementRanges:
        return self.ranges([m.out_features * self.rank for m in self.modules])

    @cached_property
    def v_ranges(self) -> noise.ElementRanges:
        return self.ranges([m.in_features * self.rank for m in self.modules])

    def ranges(self, counts: Sequence[int]) -> noise.ElementRanges:
        """The first `counts[i]` elements of every module i.

        The layout keeps the result, because an `ElementRanges` carries the tables with which `noise` draws. To make
        them costs more than a draw.
        """
        key = tuple(counts)
        if key not in self._ranges:
            pieces = [(m.name, 0, count) for m, count in zip(self.modules, key, strict=True)]
            self._ranges[key] = noise.ElementRanges.of(pieces)
        return self._ranges[key]

    def split_u(self, flat: Tensor) -> list[Tensor]:
        """(..., N_U) -> one (..., O, R) view a module."""
        return [part.unflatten(-1, (-1, self.rank)) for part in flat.split(self.u_ranges.counts, dim=-1)]

    def split_v(self, flat: Tensor) -> list[Tensor]:
        """(..., N_V) -> one (..., I, R) view a module."""
        return [part.unflatten(-1, (-1, self.rank)) for part in flat.split(self.v_ranges.counts, dim=-1)]
