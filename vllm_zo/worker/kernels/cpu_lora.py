"""LoRA on CPU as grouped GEMMs: one shrink a run of tokens that share A, one expand a run that shares the adapter.

Stock vLLM gathers A and B per token (`lora_b_weights[lora_indices_tensor]`): for a few hundred tokens that moves far
more memory than the base weights. Tokens of one request are contiguous, so a batch is a short list of runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_zo.worker.kernels.cpu_linear import is_emulated


@dataclass(frozen=True)
class Run:
    """Tokens [start, stop) that use the same slot."""

    start: int
    stop: int
    slot: int


@dataclass(frozen=True)
class Span:
    """Neighbouring runs whose slots hold the same A in their first `rank` rows: one shrink for all of them."""

    start: int
    stop: int
    rank: int
    runs: tuple[Run, ...]


class GroupedPunicaWrapper(PunicaWrapperCPU):
    """Drop-in for PunicaWrapperCPU; equal to it up to rounding for any mix of adapters and plain requests."""

    pool: Any = None
    """The SlotPool, once training is set up: it knows which slots share A and how much of their rank is in use."""

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Any, max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.refresh()

    def refresh(self) -> None:
        """Recompute the spans: the token mapping changed, or slots were rewritten under an unchanged mapping."""
        slots, counts = torch.unique_consecutive(self.token_lora_indices, return_counts=True)
        self.spans = self._group(slots.tolist(), counts.tolist())

    def _group(self, slots: list[int], counts: list[int]) -> list[Span]:
        spans: list[Span] = []
        start = 0
        for slot, count in zip(slots, counts, strict=True):
            run = Run(start, start + count, slot)
            start += count
            if slot < 0:
                continue
            last = spans[-1] if spans else None
            if last is not None and last.stop == run.start and self._shares_a(last.runs[0].slot, slot):
                spans[-1] = Span(last.start, run.stop, last.rank, (*last.runs, run))
            else:
                spans.append(Span(run.start, run.stop, self._rank(slot), (run,)))
        return spans

    def _shares_a(self, slot: int, other: int) -> bool:
        return slot == other or (self.pool is not None and self.pool.shares_a(slot, other))

    def _rank(self, slot: int) -> int:
        return -1 if self.pool is None else self.pool.used_rank(slot)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """`y[:, slice i] += scale * x A_i^T B_i^T`, each token with its own adapter; in place.

        Args:
            y: (T, sum of output slices). x: (T, I).
            lora_a_stacked: per slice (slots, 1, R, I); lora_b_stacked: per slice (slots, 1, O_i, R).
        """
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        if not add_inputs:
            y.zero_()
        wide = Tensor.float if is_emulated(x.dtype) else lambda tensor: tensor
        for span in self.spans:
            rows = wide(x[span.start : span.stop])
            offset = 0
            for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                rank = a.shape[2] if span.rank < 0 else span.rank
                shrunk = (rows @ wide(a[span.runs[0].slot, 0, :rank]).T).to(x.dtype)
                if scale != 1.0:
                    shrunk *= scale
                for run in span.runs:
                    part = shrunk[run.start - span.start : run.stop - span.start]
                    y[run.start : run.stop, offset : offset + size].addmm_(part, b[run.slot, 0, :, :rank].T)
                offset += size
