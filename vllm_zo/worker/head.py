"""Scores from hidden rows: logits of chosen tokens, or log-probabilities, computed with the LM head in float32.

Candidate labels need a few vocabulary entries of the head, and only these are read. Log-probabilities need the whole
head; it is read in chunks, with a running log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from vllm_zo.upload import upload
from vllm_zo.worker.loss_table import Entry, write_cells

Value = TypeVar("Value", bound=Hashable)

VOCAB_CHUNK = 8192
"""Vocabulary entries of the head that are widened to float32 at a time. This bounds the extra memory to chunk x hidden
size x 4 bytes."""
TOKEN_CHUNK = 1024
"""Hidden rows that are scored against a vocabulary chunk at a time: their logits take 32 MiB."""

Slots = Sequence[int | None]
"""For each hidden row, the slot whose adapter changes the LM head, or None. This is a list on the host, so that reading
it does not wait for the device."""


class Head:
    """Reads a vLLM LM head in float32, whatever the model's dtype, in plain torch.

    Args:
        lm_head: vLLM's `ParallelLMHead`. Its `weight` is (vocabulary entries of this rank and padding, D); it may have
            a `bias`.
        logits_processor: vLLM's; it gives the soft cap, the scale and the size of the vocabulary. If the head can have
            adapters, vLLM has wrapped it for LoRA, and it holds the adapters' factors.
        tp: the tensor-parallel group; each of its ranks holds a part of the vocabulary. None for a single rank.
    """

    def __init__(self, lm_head: Any, logits_processor: Any, tp: Any = None) -> None:
        self.lm_head = lm_head
        self.adapters = logits_processor
        self.soft_cap = getattr(logits_processor, "soft_cap", None)
        self.scale = getattr(logits_processor, "scale", 1.0)
        self.tp = tp if tp is not None and tp.world_size > 1 else None
        size = int(logits_processor.org_vocab_size)
        self.start = lm_head.shard_indices.org_vocab_start_index if self.tp else 0
        self.stop = lm_head.shard_indices.org_vocab_end_index if self.tp else size

    # --- entries to cells ---------------------------------------------------------------------------------------------

    def score_labels(self, hidden: Tensor, entries: Sequence[Entry]) -> None:
        """Write the logit of each entry's label into its cell. hidden: (tokens of the step, D)."""
        # All labels of an example share its row, and many examples share their labels: each is read once. Probes that
        # differ in the LM head alone share rows, too.
        states, row_of = _distinct([(entry.row, entry.slot) for entry in entries])
        labels, label_of = _distinct([entry.label for entry in entries])
        rows = [row for row, _ in states]
        slots = [slot for _, slot in states] if _has_adapter(entries) else None
        logits_TL = self._label_logits(hidden[upload(rows, hidden.device)], upload(labels, hidden.device), slots)
        wanted = [row * len(labels) + column for row, column in zip(row_of, label_of, strict=True)]
        write_cells(logits_TL.view(-1)[upload(wanted, hidden.device)], [(entry.table, entry.cell) for entry in entries])

    def score_logprobs(self, hidden: Tensor, entries: Sequence[Entry]) -> None:
        """Write the log-probability of each entry's label into its cell, and that of the likeliest token into its
        `best_cell`. hidden: (tokens of the step, D)."""
        rows, labels = [entry.row for entry in entries], [entry.label for entry in entries]
        slots = [entry.slot for entry in entries] if _has_adapter(entries) else None
        scores = self.log_probs(hidden, rows, labels, slots)
        cells = [(entry.table, entry.cell) for entry in entries]
        best_cells = [(entry.table, entry.best_cell) for entry in entries]
        write_cells(scores.flatten(), cells + best_cells)

    # --- logits -------------------------------------------------------------------------------------------------------

    def log_probs(self, hidden: Tensor, rows: Sequence[int], labels: Sequence[int], slots_T: Slots | None) -> Tensor:
        """Log-probabilities at chosen rows of `hidden`, normalised over the whole vocabulary.

        Args:
            hidden: (tokens of the step, D).
            rows, labels: T rows of `hidden`, and the label of each.

        Returns:
            (2, T) float32: of the row's label, and of the likeliest token.
        """
        hidden_TD, label_T = hidden[upload(rows, hidden.device)], upload(labels, hidden.device)
        parts = [
            self._log_probs(hidden_TD[chunk], label_T[chunk], None if slots_T is None else slots_T[chunk])
            for chunk in _token_chunks(len(hidden_TD))
        ]
        return torch.cat(parts, dim=1)

    def _log_probs(self, hidden_TD: Tensor, label_T: Tensor, slots_T: Slots | None) -> Tensor:
        hidden = hidden_TD.float()
        total = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        best, target = total, torch.zeros_like(total)  # a label that this rank does not hold has target 0
        for ids, logits in self._logits(hidden, slots_T):
            total = torch.logaddexp(total, logits.logsumexp(-1))
            best = torch.maximum(best, logits.amax(-1))
            # gather needs an index within the chunk for every row; `where` discards the rows whose label is elsewhere.
            place_T = torch.searchsorted(ids, label_T).clamp(max=len(ids) - 1)
            picked = logits.gather(1, place_T.unsqueeze(1)).squeeze(1)
            target = torch.where(ids[place_T] == label_T, picked, target)
        return self._normalised(target, total, best)

    def _logits(self, hidden: Tensor, slots_T: Slots | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits of this rank's vocabulary, chunk by chunk: token ids (C,), and (T, C) float32."""
        for first in range(self.start, self.stop, VOCAB_CHUNK):
            ids = torch.arange(first, min(first + VOCAB_CHUNK, self.stop), device=hidden.device)
            logits = self.products(hidden, ids)
            if slots_T is not None:
                logits = logits + self._adapted(hidden, ids, slots_T)
            yield ids, self._finish(logits)

    def _normalised(self, target: Tensor, total: Tensor, best: Tensor) -> Tensor:
        """Combine the ranks' parts into log-probabilities, (2, T).

        Args:
            target, total, best: (T,) float32 over this rank's vocabulary: the logit of the label, or 0 if another rank
                holds it; the log of the sum of exponentials; the largest logit.
        """
        if self.tp is not None:
            target = self.tp.all_reduce(target)
            total = self.tp.all_gather(total.unsqueeze(0), dim=0).logsumexp(0)
            best = self.tp.all_gather(best.unsqueeze(0), dim=0).amax(0)
        return torch.stack([target, best]) - total

    def without(self, hidden_TD: Tensor, moved_M: Tensor) -> Tensor:
        """What all words but some have, as the model was loaded: (2, T) float32, the log of the sum of the exponentials
        of their logits, and the largest.

        Args:
            hidden_TD: float32.
            moved_M: token ids of those that do not count, ascending. One rank holds the vocabulary.
        """
        assert self.tp is None
        return torch.cat([self._without(hidden_TD[chunk], moved_M) for chunk in _token_chunks(len(hidden_TD))], 1)

    def _without(self, hidden: Tensor, moved_M: Tensor) -> Tensor:
        total = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        best = total
        for ids, logits in self._logits(hidden, None):
            logits[:, torch.isin(ids, moved_M)] = -torch.inf
            total = torch.logaddexp(total, logits.logsumexp(-1))
            best = torch.maximum(best, logits.amax(-1))
        return torch.stack([total, best])

    def products(self, hidden_TD: Tensor, ids: Tensor) -> Tensor:
        """Rows of float32 hidden states times the weights of words that this rank holds, and their biases: (T, L)."""
        weight_LD, bias_L = self._rows(ids - self.start)
        logits_TL = hidden_TD @ weight_LD.T
        return logits_TL if bias_L is None else logits_TL + bias_L

    def with_adapter(self, products_TL: Tensor, hidden_TD: Tensor, ids: Tensor, slot: int | None) -> Tensor:
        """The logits that an adapter makes of `products`: (T, L) float32. slot: None: as the model was loaded."""
        if slot is not None:
            a_RD, b_LR = self._factors(slot, ids)
            products_TL = torch.addmm(products_TL, hidden_TD @ a_RD.T, b_LR.T)
        return self._finish(products_TL)

    def own_logits(self, hidden_TD: Tensor, label_T: Tensor) -> Tensor:
        """(T,) float32: of each row the logit of its label, as the model was loaded. hidden_TD: float32."""
        weight_TD, bias_T = self._rows(label_T)
        logits_T = (hidden_TD * weight_TD).sum(-1)
        return self._finish(logits_T if bias_T is None else logits_T + bias_T)

    def _label_logits(self, hidden_TD: Tensor, label_ids: Tensor, slots_T: Slots | None) -> Tensor:
        """Logits of labels: (T, D) hidden rows, (L,) token ids -> (T, L) float32."""
        mine = (label_ids >= self.start) & (label_ids < self.stop)
        weight_LD, bias_L = self._rows((label_ids - self.start).clamp(0, self.stop - self.start - 1))
        logits = hidden_TD.float() @ weight_LD.T
        if bias_L is not None:
            logits = logits + bias_L
        if self.tp is not None:
            # For a label of another rank, `clamp` made this rank read some other entry: `mine` zeroes that logit.
            logits = self.tp.all_reduce(logits * mine)
        if slots_T is not None:
            # After the sum over ranks: every rank holds the whole adapter, and the sum would count it once per rank.
            logits = logits + self._adapted(hidden_TD.float(), label_ids, slots_T)
        return self._finish(logits)

    def _adapted(self, hidden_TD: Tensor, ids: Tensor, slots_T: Slots) -> Tensor:
        """What adapters of the head add to logits: (T, D) float32 hidden rows, (L,) token ids -> (T, L) float32. vLLM
        keeps the whole adapter on every rank."""
        change = hidden_TD.new_zeros(len(hidden_TD), len(ids))
        for slot in dict.fromkeys(slot for slot in slots_T if slot is not None):
            rows = upload([t for t, other in enumerate(slots_T) if other == slot], hidden_TD.device)
            a_RD, b_LR = self._factors(slot, ids)
            change[rows] = hidden_TD[rows] @ a_RD.T @ b_LR.T
        return change

    def _factors(self, slot: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """A slot's (R, D) and (L, R), of some words, in float32."""
        return self.adapters.lora_a_stacked[slot, 0].float(), self.adapters.lora_b_stacked[slot, 0][ids].float()

    def _finish(self, logits: Tensor) -> Tensor:
        """Apply the soft cap and then the scale, as vLLM's LogitsProcessor does."""
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits * self.scale if self.scale != 1.0 else logits

    def _rows(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (L, D) and bias (L,) in float32. ids: (L,) entries of this rank's vocabulary, whose first is 0."""
        weight, bias = self._held()
        return weight[ids].float(), None if bias is None else bias[ids].float()

    def _held(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of this rank's vocabulary, without the padding."""
        held, bias = self.stop - self.start, getattr(self.lm_head, "bias", None)
        return self.lm_head.weight[:held], None if bias is None else bias[:held]


def _token_chunks(rows: int) -> list[slice]:
    return [slice(first, first + TOKEN_CHUNK) for first in range(0, rows, TOKEN_CHUNK)]


def _has_adapter(entries: Sequence[Entry]) -> bool:
    """Whether an adapter changes the head at any of the entries. Usually none does."""
    return any(entry.slot is not None for entry in entries)


def _distinct(values: list[Value]) -> tuple[list[Value], list[int]]:
    """The distinct values in order of first appearance, and for each value its place among them."""
    place: dict[Value, int] = {}
    return [*dict.fromkeys(values)], [place.setdefault(value, len(place)) for value in values]
