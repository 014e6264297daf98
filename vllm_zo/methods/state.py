"""The trained quantity of a job: per basis a fp32 accumulator U_acc, with V regenerated from its key. Pure torch.

The worker, `replay` and the reference trainer in the tests share this file, so a logged run rebuilds bit for bit.
All modules' U entries lie in one flat float32 vector (N,): noise, update and logging touch it in single operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.base import Method, ModuleShape, ProbePlan

BASIS_STREAM = "V"


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

    def split_u(self, flat: Tensor) -> list[Tensor]:
        """(..., N_U) -> one (..., O, R) view a module."""
        return [part.unflatten(-1, (-1, self.rank)) for part in flat.split(self.u_ranges.counts, dim=-1)]

    def split_v(self, flat: Tensor) -> list[Tensor]:
        """(..., N_V) -> one (..., I, R) view a module."""
        return [part.unflatten(-1, (-1, self.rank)) for part in flat.split(self.v_ranges.counts, dim=-1)]


class AdapterState:
    """Accumulators and factors of one job.

    The delta to the base weights of a module is `sum_b U_acc[b] V_b^T` over the bases held here.

    Args:
        num_bases: bases kept at once (1 in `fold` space, M in `bank` space).
    """

    def __init__(
        self, method: Method, layout: FactorLayout, job_seed: int, num_bases: int, device: torch.device | str = "cpu"
    ) -> None:
        self.method = method
        self.layout = layout
        self.job_seed = job_seed
        self.num_bases = num_bases
        self.device = torch.device(device)
        self.acc_BN = torch.zeros(num_bases, layout.u_ranges.total, dtype=torch.float32, device=device)
        self.versions = [0] * num_bases
        """Updates each accumulator has seen; with its basis, a name for its content."""
        self.basis_of_row: dict[int, int] = {}
        """Accumulators in use and the basis each belongs to."""
        self._u_cache: tuple[tuple[int, ...], Tensor] | None = None

    def factory(self) -> Callable[[], AdapterState]:
        """Makes empty states of the same job, without keeping this one alive."""
        return partial(AdapterState, self.method, self.layout, self.job_seed, self.num_bases, self.device)

    def row(self, basis: int) -> int:
        """Which accumulator belongs to a basis."""
        return basis % self.num_bases

    def touched_bases(self) -> list[tuple[int, int]]:
        """(row, basis) of every accumulator that has been updated, by row."""
        return sorted(self.basis_of_row.items())

    def mark_touched(self, bases: Iterable[int]) -> None:
        """Say which bases the accumulators hold, after they were loaded from a snapshot."""
        self.basis_of_row = {self.row(basis): basis for basis in bases}

    def v_flat(self, basis: int) -> Tensor:
        """(N_V,) float32: V of a basis, from its key alone."""
        key = noise.derive_key(self.job_seed, BASIS_STREAM, basis)
        return noise.normal(key, self.layout.v_ranges, self.device)

    def u_flat(self, seeds: Sequence[int]) -> Tensor:
        """(K, N_U) float32: the directions' left factors. Kept until other seeds are asked for: the update that follows
        a probe uses the very tensor that was probed, and evicting it is free."""
        wanted = tuple(seeds)
        if self._u_cache is None or self._u_cache[0] != wanted:
            u_KN = torch.stack([noise.normal(seed, self.layout.u_ranges, self.device) for seed in wanted])
            self._u_cache = (wanted, u_KN)
        return self._u_cache[1]

    def apply(self, plan: ProbePlan, coefficients_K: Tensor, learning_rate: float) -> None:
        """Move the accumulator of the plan's basis along the probed directions."""
        row = self.row(plan.basis)
        self.acc_BN[row] = self.method.update(
            self.acc_BN[row], self.u_flat(plan.seeds), coefficients_K.to(self.device), learning_rate
        )
        self.basis_of_row[row] = plan.basis
        self.versions[row] += 1

    def take(self) -> tuple[int, Tensor] | None:
        """The single accumulator and its basis, to be folded; the state is zero afterwards. None if nothing was
        added."""
        assert self.num_bases == 1, "only a fold-space state gives its accumulator away"
        if not self.basis_of_row:
            return None
        basis, acc = self.basis_of_row.pop(0), self.acc_BN[0].clone()
        self.acc_BN.zero_()
        return basis, acc
