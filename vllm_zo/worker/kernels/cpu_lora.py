"""LoRA on CPU as grouped GEMMs: one shrink a run of tokens that share A, one expand a run that shares the adapter.

Stock vLLM gathers A and B per token (`lora_b_weights[lora_indices_tensor]`): for a few hundred tokens that moves far
more memory than the base weights. Tokens of one request are contiguous, so a batch is a short list of runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_zo.worker.kernels.cpu_linear import is_emulated

MAX_KEPT_VIEWS = 1 << 14
"""Entries of a few hundred bytes: slots x layers of a large model, and a bound if a caller makes tuples on the fly."""


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._whole_batch: tuple[Tensor, Tensor, list[Span]] | None = None
        self._kept_views: dict[tuple[int, int, int], tuple[tuple[Tensor, ...], list[Tensor]]] = {}

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Any, max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.refresh()

    def refresh(self) -> None:
        """Recompute the spans: the token mapping changed, or slots were rewritten under an unchanged mapping."""
        self.spans = self._spans_of(self.token_lora_indices)

    # --- a forward on other rows than those of vLLM's batch, or on some of them ---------------------------------------

    def take_rows(self, slots: Tensor, vocab_size: int) -> None:
        """Until the next `update_metadata`, rows use these slots; -1 for none."""
        self._set_rows(slots, slots.clamp(min=0) * vocab_size)
        self.refresh()

    def restrict(self, rows: Tensor) -> None:
        """Until `restore`, inputs hold only these rows of the batch."""
        tokens, embeddings = self.token_lora_indices, self._embeddings_indices[: len(self.token_lora_indices)]
        self._whole_batch = tokens.clone(), embeddings.clone(), self.spans
        self._set_rows(tokens[rows], embeddings[rows])
        self.refresh()

    def restore(self) -> None:
        assert self._whole_batch is not None, "restore without restrict"
        tokens, embeddings, self.spans = self._whole_batch
        self._set_rows(tokens, embeddings)
        self._whole_batch = None

    def _set_rows(self, tokens: Tensor, embeddings: Tensor) -> None:
        self._token_lora_indices[: len(tokens)] = tokens
        self._embeddings_indices[: len(embeddings)] = embeddings
        self.indices_len[0] = self.indices_len[3] = len(tokens)

    @contextmanager
    def linears_on(self, spans: list[Span]) -> Iterator[None]:
        """In the block, linear layers see the rows that `spans` describe."""
        saved, self.spans = self.spans, spans
        try:
            yield
        finally:
            self.spans = saved

    def spans_of_rows(self, rows: Tensor) -> list[Span]:
        """Spans of some rows of those that linear layers see now."""
        return self._spans_of(self.token_lora_indices[rows])

    # --- spans --------------------------------------------------------------------------------------------------------

    def _spans_of(self, slot_of_token: Tensor) -> list[Span]:
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
        return spans

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
        """`y[:, slice i] += scale * x A_i^T B_i^T`, each token with its own adapter; in place.

        Args:
            y: (T, sum of output slices). x: (T, I).
            lora_a_stacked: per slice (slots, 1, R, I); lora_b_stacked: per slice (slots, 1, O_i, R).
        """
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        if not add_inputs:
            y.zero_()
        emulated = is_emulated(x.dtype)
        for span in self.spans:
            rank = lora_a_stacked[0].shape[2] if span.rank < 0 else span.rank
            pages = self._views(lora_a_stacked, span.runs[0].slot, rank, of_a=True)
            a = pages[0] if len(pages) == 1 else torch.cat(pages)  # one pass over x serves all slices
            rows = x[span.start : span.stop]
            shrunk = (rows.float() @ a.float().T).to(x.dtype) if emulated else rows @ a.T
            if scale != 1.0:
                shrunk *= scale
            for run in span.runs:
                parts = shrunk[run.start - span.start : run.stop - span.start].split(rank, 1)
                outs = y[run.start : run.stop].split_with_sizes(list(output_slices), 1)
                pages = self._views(lora_b_stacked, run.slot, rank, of_a=False)
                for out, part, b in zip(outs, parts, pages, strict=True):
                    out.addmm_(part, b)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """`y += x B^T`, each token with its own adapter; in place. y: (T, H), x: (T, R), B: (slots, 1, H, R)."""
        if not add_inputs:
            y.zero_()
        for span in self.spans:
            for run in span.runs:
                rows = slice(run.start, run.stop)
                y[rows].addmm_(x[rows].to(y.dtype), lora_b_stacked[run.slot, 0].T)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **kwargs: Any
    ) -> None:
        """`y += scale * x A^T B^T`, each row of logits with its own adapter; in place. Rows without one have slot -1,
        and vLLM 0.32 gives those the last slot's.

        Args:
            y: (rows, vocabulary or more). x: (rows, H).
            lora_a_stacked: (slots, 1, R, H). lora_b_stacked: (slots, 1, vocabulary, R).
        """
        for span in self._spans_of(self.sampler_indices):
            for run in span.runs:
                rows = slice(run.start, run.stop)
                a, b = lora_a_stacked[run.slot, 0].float(), lora_b_stacked[run.slot, 0].float()
                y[rows, : len(b)] += scale * (x[rows].float() @ a.T @ b.T)

    def _views(self, stacked: tuple[Tensor, ...], slot: int, rank: int, *, of_a: bool) -> list[Tensor]:
        """Per slice, what is in use of a slot: (rank, I) of A or (rank, O) of B. Making them takes as long as a small
        model's product, so they are kept, with the tuple whose id names them."""
        key = id(stacked), slot, rank
        if key not in self._kept_views:
            if len(self._kept_views) >= MAX_KEPT_VIEWS:
                self._kept_views.clear()
            views = [page[slot, 0, :rank] if of_a else page[slot, 0, :, :rank].T for page in stacked]
            self._kept_views[key] = stacked, views
        return self._kept_views[key][1]
