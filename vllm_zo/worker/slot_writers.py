"""Where a job's factors lie in vLLM's stacked LoRA tensors, and the interface that writes a flat vector there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from vllm_zo.methods.layout import FactorLayout
from vllm_zo.worker.lora_targets import Target


@dataclass(frozen=True)
class Piece:
    """The place of one module's factor.

    Attributes:
        slots: (slots, features, LoRA ranks) view of the module's stacked tensor, of any strides. The features are the
            module's outputs (of B) or inputs (of A) on this tensor-parallel rank.
        offset: index in the flat vector of the first element that this tensor-parallel rank holds.
    """

    slots: Tensor
    offset: int


class SlotWriter(Protocol):
    """Writes a flat vector with the factors of all modules of a job into one rank block of a slot."""

    def write(self, flat: Tensor, slot: int, block: int, factor: float, rows: Tensor | None = None) -> None:
        """For every module: `slots[slot, i, block * r + j] = factor * flat[offset + i * r + j]`, j < r.

        Args:
            flat: (N,) float32, the factors of all modules over all tensor-parallel ranks.
            slot: index among all of vLLM's slots.
            block: index of the rank block.
            factor: scales all values.
            rows: of the job's only module, the features with numbers other than 0. The slot has zeros for all others,
                and a writer may leave them out. None: any feature may have some.
        """


@dataclass(frozen=True)
class SlotWriters:
    """The writers of a job: `a` writes A from a flat V, `b` writes B from a flat U."""

    a: SlotWriter
    b: SlotWriter

    @classmethod
    def of(
        cls, layout: FactorLayout, targets: tuple[Target, ...], make: Callable[[Sequence[Piece], int], SlotWriter]
    ) -> SlotWriters:
        """Make the writers of a job.

        Args:
            layout: of the job's factors.
            targets: the job's modules on this pipeline stage, in the layout's order.
            make: makes the platform's writer from pieces, in the order of their offsets, and the LoRA rank.
        """
        r = layout.rank
        # The flat vectors count all tensor-parallel ranks; `in_slice` and `out_slice` lead to the part of this one.
        names = [module.name for module in layout.modules]
        first_v = dict(zip(names, accumulate(layout.v_ranges.counts, initial=0), strict=False))
        first_u = dict(zip(names, accumulate(layout.u_ranges.counts, initial=0), strict=False))
        a = [Piece(t.a_slots, first_v[t.shape.name] + t.in_slice.start * r) for t in targets]
        b = [Piece(t.b_slots, first_u[t.shape.name] + t.out_slice.start * r) for t in targets]
        return cls(make(a, r), make(b, r))
