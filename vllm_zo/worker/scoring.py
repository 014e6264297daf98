"""Scores on the device: from hidden rows at target positions to float32 cells of a loss table.

Only the rows of the LM head that are needed are read: a handful for candidate labels, the whole head in chunks (with a
running log-sum-exp) for log-probabilities. A cell belongs to one (probe, row, target): a member that runs again after a
preemption overwrites its own cells and adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_zo.commands import ScoreMember
from vllm_zo.objectives.base import EncodedExample, ScoringRow
from vllm_zo.objectives.cells import flatten_rows, row_offsets

VOCAB_CHUNK = 8192
"""LM-head rows upcast to float32 at a time: bounds the extra memory to chunk x hidden x 4 bytes."""
TOKEN_CHUNK = 1024
"""Target positions scored at a time against a vocabulary chunk."""


Slots = Sequence[int | None]


class Head:
    """Reads logits of chosen tokens from a vLLM LM head in float32, whatever the model's dtype.

    `slots_T`, where given, has for each hidden row the slot whose adapter of the head counts, None for none. It is
    known on the host.

    Args:
        lm_head: `ParallelLMHead`, or anything with `weight` (vocabulary rows of this rank) and optional `bias`.
        logits_processor: vLLM's, for soft cap and scale; may be wrapped for LoRA.
        vocab_start, vocab_stop: token ids whose rows this rank holds.
        all_reduce: sums a tensor over tensor-parallel ranks, in the same order on every rank.
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

    def _finish(self, logits: Tensor) -> Tensor:
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits * self.scale if self.scale != 1.0 else logits

    def _rows(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._held()
        return weight[ids].float(), None if bias is None else bias[ids].float()

    def _adapted(self, hidden_TD: Tensor, ids: Tensor, slots_T: Slots) -> Tensor:
        """(T, D) float32, (L,) token ids -> (T, L): what the adapters of the head add. Every rank has them whole."""
        change = hidden_TD.new_zeros(len(hidden_TD), len(ids))
        for slot in dict.fromkeys(slot for slot in slots_T if slot is not None):
            rows = upload([t for t, other in enumerate(slots_T) if other == slot], hidden_TD.device)
            a_RD = self.adapters.lora_a_stacked[slot, 0].float()
            b_LR = self.adapters.lora_b_stacked[slot, 0][ids].float()
            change[rows] = hidden_TD[rows] @ a_RD.T @ b_LR.T
        return change

    def label_logits(self, hidden_TD: Tensor, label_ids: Tensor, slots_T: Slots | None = None) -> Tensor:
        """(T, D) hidden rows, (L,) token ids -> (T, L) float32 logits."""
        mine = (label_ids >= self.start) & (label_ids < self.stop)
        weight_LD, bias_L = self._rows((label_ids - self.start).clamp(0, self.stop - self.start - 1))
        logits = hidden_TD.float() @ weight_LD.T
        if bias_L is not None:
            logits = logits + bias_L
        if self.tp is not None:
            logits = self.tp.all_reduce(logits * mine)
        if slots_T is not None:
            logits = logits + self._adapted(hidden_TD.float(), label_ids, slots_T)
        return self._finish(logits)

    def log_probs(self, hidden_TD: Tensor, label_T: Tensor, slots_T: Slots | None = None) -> Tensor:
        """(T, D) hidden rows, (T,) token ids -> (2, T) float32 log p of that token, and of the likeliest one;
        normalised over the vocabulary."""
        parts = []
        for first in range(0, len(hidden_TD), TOKEN_CHUNK):
            chunk = slice(first, first + TOKEN_CHUNK)
            parts.append(self._log_probs(hidden_TD[chunk], label_T[chunk], None if slots_T is None else slots_T[chunk]))
        return torch.cat(parts, dim=1)

    @property
    def has_kernels(self) -> bool:
        """Whether scores without an adapter on the head are read by `triton_scores`."""
        return has_kernels(self.lm_head.weight)

    def log_probs_of_rows(self, hidden_TD: Tensor, rows: Sequence[int], labels: Sequence[int]) -> Tensor:
        """The same for chosen rows of `hidden`, in one launch."""
        from vllm_zo.worker.kernels.triton_scores import log_prob_parts

        weight, bias = self._held()
        rows_T, label_T = upload([rows, labels], hidden_TD.device)
        parts = log_prob_parts(
            hidden_TD, weight, bias, rows_T, label_T - self.start, soft_cap=self.soft_cap, scale=self.scale
        )
        return self._normalised(*parts)

    def write_label_logits(self, hidden_TD: Tensor, entries: Sequence[tuple[int, int, int]], cells: Tensor) -> None:
        """Label logits into a loss table in one launch, from entries (row, label, place); needs the whole head."""
        from vllm_zo.worker.kernels.triton_scores import label_logits

        weight, bias = self._held()
        uploaded = upload(entries, hidden_TD.device)
        label_logits(hidden_TD, weight, bias, uploaded, cells, soft_cap=self.soft_cap, scale=self.scale)

    def _held(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of this rank, without the rows that pad its vocabulary."""
        held, bias = self.stop - self.start, getattr(self.lm_head, "bias", None)
        return self.lm_head.weight[:held], None if bias is None else bias[:held]

    def _log_probs(self, hidden_TD: Tensor, label_T: Tensor, slots_T: Slots | None) -> Tensor:
        hidden = hidden_TD.float()
        total = torch.full((hidden.shape[0],), -torch.inf, device=hidden.device)
        best = total
        target = torch.zeros(hidden.shape[0], device=hidden.device)
        for first in range(self.start, self.stop, VOCAB_CHUNK):
            ids = torch.arange(first, min(first + VOCAB_CHUNK, self.stop), device=hidden.device)
            weight, bias = self._rows(ids - self.start)
            logits = hidden @ weight.T
            logits = logits if bias is None else logits + bias
            if slots_T is not None:
                logits = logits + self._adapted(hidden, ids, slots_T)
            logits = self._finish(logits)
            total = torch.logaddexp(total, logits.logsumexp(-1))
            best = torch.maximum(best, logits.amax(-1))
            inside = (label_T >= first) & (label_T < first + len(ids))
            picked = logits.gather(1, (label_T - first).clamp(0, len(ids) - 1).unsqueeze(1)).squeeze(1)
            target = torch.where(inside, picked, target)
        return self._normalised(target, total, best)

    def _normalised(self, target: Tensor, total: Tensor, best: Tensor) -> Tensor:
        """Logit of the label (0 on other ranks), log-sum and largest logit of this rank to (2, T) log-probabilities."""
        if self.tp is not None:
            target = self.tp.all_reduce(target)
            total = self.tp.all_gather(total.unsqueeze(0), dim=0).logsumexp(0)
            best = self.tp.all_gather(best.unsqueeze(0), dim=0).amax(0)
        return torch.stack([target, best]) - total


@dataclass
class LossTable:
    """(probes, cells) float32, NaN until scored: a cell that was never written makes the group non-finite, not zero."""

    examples: tuple[EncodedExample, ...]
    rows: list[ScoringRow]
    offsets: list[int]
    cells_PC: Tensor

    @classmethod
    def empty(cls, examples: tuple[EncodedExample, ...], probes: int, device: torch.device) -> LossTable:
        *offsets, total = row_offsets(examples)
        cells = torch.full((probes, total), torch.nan, dtype=torch.float32, device=device)
        return cls(examples, flatten_rows(examples), offsets, cells)


class Present(NamedTuple):
    """A member with `tokens` in this engine step, the first at `first_row` among the hidden states."""

    member: ScoreMember
    table: LossTable
    first_row: int
    tokens: int
    slot: int | None = None
    """Where its adapter lies among all of vLLM's, if that changes the LM head."""


def score_members(head: Head, hidden: Tensor, members: Sequence[Present]) -> None:
    """Write the cells of all members that have target positions in this engine step.

    Args:
        hidden: (tokens of the step, D).
    """
    for kind in ("labels", "logprobs"):
        index: list[int] = []
        labels: list[int] = []
        slots: list[int | None] = []
        cells: list[tuple[LossTable, int, int]] = []
        bests: list[tuple[LossTable, int, int]] = []
        for member, table, first, count, slot in members:
            row = table.rows[member.row]
            if row.kind != kind:
                continue
            cell = table.offsets[member.row]
            seen = range(member.num_computed_tokens, member.num_computed_tokens + count)
            for i, position in enumerate(row.positions):
                if position not in seen:
                    continue
                wanted = row.label_ids if kind == "labels" else row.label_ids[i : i + 1]
                for j, label in enumerate(wanted):
                    index.append(first + position - member.num_computed_tokens)
                    labels.append(label)
                    slots.append(slot)
                    cells.append((table, member.probe, cell + i + j))
                if kind == "logprobs":
                    bests.append((table, member.probe, cell + len(row.label_ids) + i))
        if not index:
            continue
        adapted = slots if any(slot is not None for slot in slots) else None
        if kind == "labels" and adapted is None and head.has_kernels and head.tp is None:
            for table, source, places in _by_table(cells):
                entries = [(index[i], labels[i], place) for i, place in zip(source, places, strict=True)]
                head.write_label_logits(hidden, entries, table.cells_PC)
        else:
            _write(_scores(head, hidden, kind, index, labels, adapted), [*cells, *bests])


def has_kernels(weight: Tensor) -> bool:
    """Whether an LM head can be read by the Triton kernels."""
    return weight.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16, torch.float32)


def _scores(head: Head, hidden: Tensor, kind: str, index: list[int], labels: list[int], slots: Slots | None) -> Tensor:
    """Flat: the label's score per entry; for kind "logprobs" followed by the likeliest token's."""
    device = hidden.device
    if kind == "logprobs" and slots is None and head.has_kernels:
        return head.log_probs_of_rows(hidden, index, labels).flatten()
    if kind == "logprobs":
        return head.log_probs(hidden[upload(index, device)], upload(labels, device), slots).flatten()
    rows, row_of = _distinct(index)
    ids, id_of = _distinct(labels)
    if slots is not None:
        slot_of_row = dict(zip(index, slots, strict=True))
        slots = [slot_of_row[row] for row in rows]
    logits_TL = head.label_logits(hidden[upload(rows, device)], upload(ids, device), slots)
    wanted = [row * len(ids) + column for row, column in zip(row_of, id_of, strict=True)]
    return logits_TL.view(-1)[upload(wanted, device)]


def _distinct(values: list[int]) -> tuple[list[int], list[int]]:
    """The distinct values in order of first appearance, and for each entry which of them it is."""
    place: dict[int, int] = {}
    return [*dict.fromkeys(values)], [place.setdefault(value, len(place)) for value in values]


def upload(values: Sequence[Any], device: torch.device) -> Tensor:
    """Integers, or equal sequences of them, as int64 on the device; the host does not wait for the copy (from pageable
    memory it would)."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _by_table(cells: list[tuple[LossTable, int, int]]) -> list[tuple[LossTable, list[int], list[int]]]:
    """Each table with the entries that belong to it, and their places in it."""
    by_table: dict[int, tuple[LossTable, list[int], list[int]]] = {}
    for i, (table, probe, cell) in enumerate(cells):
        _, source, places = by_table.setdefault(id(table), (table, [], []))
        source.append(i)
        places.append(probe * table.cells_PC.shape[1] + cell)
    return list(by_table.values())


def _write(values: Tensor, cells: list[tuple[LossTable, int, int]]) -> None:
    tables = _by_table(cells)
    for table, source, places in tables:
        chosen = values if len(tables) == 1 else values[upload(source, values.device)]
        table.cells_PC.view(-1)[upload(places, values.device)] = chosen
