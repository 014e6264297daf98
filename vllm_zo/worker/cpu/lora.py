"""LoRA on CPU as grouped GEMMs: one shrink for neighbouring tokens that share A, one expand for those of one adapter.

vLLM's own wrapper gathers A and B for each token (`lora_b_weights[lora_indices_tensor]`). For a few hundred tokens this
moves far more memory than the base weights. The tokens of a request are contiguous, so a batch is a short list of runs.

Our compiled kernel (`native.py`) takes the runs of a linear layer in one call; torch's products where it cannot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_zo.worker.cpu import native
from vllm_zo.worker.cpu.linear import is_emulated

MAX_KEPT = 1 << 14
"""Bound on the cache of views and pointers. The slots and layers of a large model need fewer entries, of a few hundred
bytes each. Without a bound, a caller that passes new tuples at each call would fill the memory."""


@dataclass(frozen=True)
class Run:
    """Tokens [start, stop) that use the same slot."""

    start: int
    stop: int
    slot: int


@dataclass(frozen=True)
class Span:
    """Neighbouring runs with the same A: one shrink serves them all. `rank` is the number of leading ranks in use, or
    -1 for all of them."""

    start: int
    stop: int
    rank: int
    runs: tuple[Run, ...]


class Spans(tuple[Span, ...]):
    """The spans of a batch, ascending."""

    @functools.cached_property
    def runs(self) -> Tensor:
        """(runs, 4) int64 for our kernel: start, stop, slot, rank."""
        runs = [(run.start, run.stop, run.slot, span.rank) for span in self for run in span.runs]
        return torch.tensor(runs, dtype=torch.int64).view(len(runs), 4)

    @property
    def stop(self) -> int:
        """Behind the last row of a span."""
        return self[-1].stop if self else 0


class GroupedPunicaWrapper(PunicaWrapperCPU):
    """Replaces PunicaWrapperCPU, and gives the same results up to rounding, for requests with and without adapters."""

    pool: Any = None
    """The SlotPool, once the worker has made its trainer. It knows which slots share A, and how many of their ranks are
    in use."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # From `save_batch` to `restore_batch`: slots of tokens, offsets of embeddings and spans of the batch.
        self._batch: tuple[Tensor, Tensor, Spans] | None = None
        self._kept: dict[tuple[int, ...], tuple[tuple[Any, ...], Any]] = {}

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Any, max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.refresh()

    def refresh(self) -> None:
        """Recompute the spans, after the slots of tokens or the content of slots have changed."""
        self.spans = self._spans_of(self.token_lora_indices)

    # --- a forward on other rows than those of vLLM's batch, or on some of its rows -----------------------------------

    def take_rows(self, slots: Tensor, vocab_size: int) -> None:
        """Until the next `update_metadata` or `restore_batch`, layers get rows that use these slots.

        Args:
            slots: (rows,) int64, -1 for a row without an adapter.
            vocab_size: of the model, as vLLM's manager knows it.
        """
        # The embedding's offset is slot * vocab_size. Without an adapter vLLM reads the A of slot 0 too; no B is added.
        self._set_rows(slots, slots.clamp(min=0) * vocab_size)
        self.refresh()

    def save_batch(self) -> Tensor:
        """The slots of vLLM's batch, (T,) int64, which `restore_batch` brings back."""
        # Clones, because `_set_rows` writes to the buffers that both are views of.
        tokens, embeddings = self.token_lora_indices, self._embeddings_indices[: len(self.token_lora_indices)]
        self._batch = tokens.clone(), embeddings.clone(), self.spans
        return self._batch[0]

    def restore_batch(self) -> None:
        """Let layers get the rows of vLLM's batch again."""
        assert self._batch is not None, "restore_batch without save_batch"
        tokens, embeddings, self.spans = self._batch
        self._set_rows(tokens, embeddings)
        self._batch = None

    def _set_rows(self, tokens: Tensor, embeddings: Tensor) -> None:
        # Private: vLLM's properties are views of these buffers, and `indices_len` has the lengths of the views: its
        # entry 0 is for tokens, 3 for embeddings.
        self._token_lora_indices[: len(tokens)] = tokens
        self._embeddings_indices[: len(embeddings)] = embeddings
        self.indices_len[0] = self.indices_len[3] = len(tokens)

    @contextmanager
    def linears_on(self, spans: Spans) -> Iterator[None]:
        """In the block, linear layers get the rows that `spans` describe, as `spans_of_rows` made them."""
        saved, self.spans = self.spans, spans
        try:
            yield
        finally:
            self.spans = saved

    def spans_of_rows(self, rows: Tensor) -> Spans:
        """The spans of some of the rows that linear layers get now. rows: (P,) int64, ascending."""
        return self._spans_of(self.token_lora_indices[rows])

    # --- spans --------------------------------------------------------------------------------------------------------

    def _spans_of(self, slot_of_token: Tensor) -> Spans:
        # Runs are found by torch: a loop over single tokens would be slow in Python.
        slots, counts = torch.unique_consecutive(slot_of_token, return_counts=True)
        spans: list[Span] = []
        start = 0
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            run = Run(start, start + count, slot)
            start += count
            if slot < 0:
                continue
            last = spans[-1] if spans else None
            if last is not None and last.stop == run.start and self._shares_a(last.runs[0].slot, slot):
                spans[-1] = Span(last.start, run.stop, last.rank, (*last.runs, run))
            else:
                spans.append(Span(run.start, run.stop, self._rank(slot), (run,)))
        return Spans(spans)

    def _shares_a(self, slot: int, other: int) -> bool:
        return slot == other or (self.pool is not None and self.pool.shares_a(slot, other))

    def _rank(self, slot: int) -> int:
        return -1 if self.pool is None else self.pool.used_rank(slot)

    # --- the product --------------------------------------------------------------------------------------------------

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
        """`y[:, slice i] += scale * x A_i^T B_i^T` in place, with the adapter of each token.

        Args:
            y: (T, sum of output slices).
            x: (T, I).
            lora_a_stacked: for each slice (slots, 1, R, I).
            lora_b_stacked: for each slice (slots, 1, O_i, R).
            add_inputs: False: y is overwritten, and is zero for tokens without an adapter.
        """
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        if not add_inputs:
            y.zero_()
        factors = self.factors(lora_a_stacked, lora_b_stacked, x)
        if factors is not None and native.fits(x, y):
            native.low_rank(y, x, factors, self.spans.runs, scale)
            return
        emulated = is_emulated(x.dtype)
        for span in self.spans:
            rank = lora_a_stacked[0].shape[2] if span.rank < 0 else span.rank
            slices = self._views(lora_a_stacked, span.runs[0].slot, rank, of_a=True)
            a = slices[0] if len(slices) == 1 else torch.cat(slices)  # one pass over x serves all slices
            rows = x[span.start : span.stop]
            shrunk = (rows.float() @ a.float().T).to(x.dtype) if emulated else rows @ a.T
            if scale != 1.0:
                shrunk *= scale
            for run in span.runs:
                parts = shrunk[run.start - span.start : run.stop - span.start].split(rank, 1)
                outs = y[run.start : run.stop].split_with_sizes(list(output_slices), 1)
                slices = self._views(lora_b_stacked, run.slot, rank, of_a=False)
                for out, part, b in zip(outs, parts, slices, strict=True):
                    out.addmm_(part, b)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """`y += x B^T` in place, with the adapter of each token. y: (T, H), x: (T, R), B: (slots, 1, H, R)."""
        if not add_inputs:
            y.zero_()
        for span in self.spans:
            for run in span.runs:
                rows = slice(run.start, run.stop)
                y[rows].addmm_(x[rows].to(y.dtype), lora_b_stacked[run.slot, 0].T)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **kwargs: Any
    ) -> None:
        """`y += scale * x A^T B^T` in place, with the adapter of each row.

        Rows without an adapter have slot -1 and stay as they are. vLLM 0.32 would give them the last slot's adapter.

        Args:
            y: (rows, vocabulary or more).
            x: (rows, H).
            lora_a_stacked: (slots, 1, R, H).
            lora_b_stacked: (slots, 1, vocabulary, R).
        """
        # Not `self.spans`: the rows to sample from are other rows than those of the linear layers.
        for span in self._spans_of(self.sampler_indices):
            for run in span.runs:
                rows = slice(run.start, run.stop)
                a, b = lora_a_stacked[run.slot, 0].float(), lora_b_stacked[run.slot, 0].float()
                y[rows, : len(b)] += scale * (x[rows].float() @ a.T @ b.T)

    def factors(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...], x: Tensor) -> native.Factors | None:
        """Where a layer's factors lie, for our kernels; None if they cannot take them with the rows x, (T, I). a, b: as
        in `add_lora_linear`."""
        if not native.fits(a[0], x) or self.spans.stop > len(x):
            return None
        found: native.Factors | None = self._keep((a, b), (), lambda: native.factors(a, b))
        return found

    def _views(self, stacked: tuple[Tensor, ...], slot: int, rank: int, *, of_a: bool) -> list[Tensor]:
        """For each slice, the part of a slot that is in use: (rank, I) of A or (rank, O) of B.

        Making the views takes as long as a small model's product, so they are kept.
        """
        views: list[Tensor] = self._keep(
            (stacked,),
            (slot, rank),
            lambda: [one[slot, 0, :rank] if of_a else one[slot, 0, :, :rank].T for one in stacked],
        )
        return views

    def _keep(self, of: tuple[Any, ...], numbers: tuple[int, ...], make: Callable[[], Any]) -> Any:
        """What `make` gives for these objects and numbers, made once."""
        # Entries are found by the objects' ids. They hold the objects too, so that no other can get such an id.
        key = (*map(id, of), *numbers)
        if key not in self._kept:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = of, make()
        return self._kept[key][1]
