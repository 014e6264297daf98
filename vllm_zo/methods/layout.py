"""Where each module's numbers lie in the flat vectors. Pure torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.probe import ModuleShape


@dataclass(frozen=True)
class FactorLayout:
    """Where each module's factors lie in the flat vectors of U (sum of O*R) and V (sum of I*R).

    `out_slices` / `in_slices` restrict every module to this rank's shard (tensor parallel); noise does not notice,
    because it is a function of the *global* element index.
    """

    modules: tuple[ModuleShape, ...]
    rank: int
    out_slices: tuple[slice, ...] | None = None
    in_slices: tuple[slice, ...] | None = None
    _ranges: dict[tuple[int, ...], noise.ElementRanges] = field(default_factory=dict, repr=False, compare=False)

    def _rows(self, full: list[int], slices: tuple[slice, ...] | None) -> list[tuple[int, int]]:
        if slices is None:
            return [(0, size) for size in full]
        return [s.indices(size)[:2] for s, size in zip(slices, full, strict=True)]

    @cached_property
    def u_ranges(self) -> noise.ElementRanges:
        rows = self._rows([m.out_features for m in self.modules], self.out_slices)
        return noise.ElementRanges.of(
            [(m.name, a * self.rank, b * self.rank) for m, (a, b) in zip(self.modules, rows, strict=True)]
        )

    @cached_property
    def v_ranges(self) -> noise.ElementRanges:
        rows = self._rows([m.in_features for m in self.modules], self.in_slices)
        return noise.ElementRanges.of(
            [(m.name, a * self.rank, b * self.rank) for m, (a, b) in zip(self.modules, rows, strict=True)]
        )

    def ranges(self, counts: Sequence[int]) -> noise.ElementRanges:
        """Elements 0 to `counts[i]` of module i: what is drawn for quantities that are neither U nor V."""
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
