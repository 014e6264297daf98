"""What a job does not move is not computed again: other words' part of a softmax, and all of a batch but its adapter.

A job that trains the LM head alone leaves the hidden states as they are, and with `u="written"` it moves the rows of
some words only. What the others have, the log of the sum of their exponentials and their largest logit, is then the
same at every step and for every probe: it is computed once a position, and a step multiplies with the moved rows alone.

Where the next step scores the same batch, as those do that score what the state has written, these products are the
same, too. So a batch's are kept until another comes, and what a probe adds to them is of its adapter's rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_zo.objectives.base import ScoringSequence
from vllm_zo.upload import upload
from vllm_zo.worker.head import Head
from vllm_zo.worker.loss_table import LossTable

ROOM = 8 << 20
"""Logits of moved words that are held at a time: 32 MiB. A batch is kept if they and its hidden states are no more."""
MOST_TOKENS = 1 << 20
"""Of the sequences whose other words are kept. More come where the state writes what it is scored by."""


class Scored(NamedTuple):
    """A whole sequence to score under a probe, each of whose positions has a row in this engine step."""

    table: LossTable
    probe: int
    sequence: int
    """Its number in the table."""
    first_row: int
    """Row of the sequence's first token among the step's hidden states."""
    slot: int | None
    """Of the probe's adapter, among all of vLLM's."""


class UnmovedWords:
    """Scores sequences of a job as `Head.score_logprobs` does, with products of the moved rows alone.

    Args:
        moved_M: token ids of the words that the job moves, ascending.
    """

    def __init__(self, moved_M: Tensor) -> None:
        self.moved_M = moved_M
        self._others: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
        """Tokens and scored positions of a sequence -> (2, positions): log of the sum, largest logit."""
        self._tokens = 0
        """Of the sequences in `_others`."""
        self._last: _Batch | None = None

    def knows(self, scored: Sequence[Scored]) -> bool:
        """Whether these sequences are the last batch: then `score` needs no hidden states."""
        parts = _parts(scored)
        return self._last is not None and len(parts) == 1 and self._last.is_of(parts[0])

    def score(self, head: Head, hidden: Tensor | None, scored: Sequence[Scored]) -> None:
        """Write the cells of sequences.

        Args:
            hidden: (tokens of the step, D); None if it `knows` them.
        """
        for part in _parts(scored):
            batch = self._last
            if batch is None or not batch.is_of(part):
                assert hidden is not None
                batch = self._batch(head, hidden, part)
            batch.write(head, part)
            self._last = batch if batch.is_small else None

    def _batch(self, head: Head, hidden: Tensor, part: _Part) -> _Batch:
        rows = [
            row + position for row, s in zip(part.first_rows, part.sequences, strict=True) for position in s.positions
        ]
        hidden_TD = hidden[upload(rows, hidden.device)].float()
        others_2T = self._others_of(head, hidden_TD, part.sequences)
        return _Batch(head, part, hidden_TD, others_2T, self.moved_M)

    def _others_of(self, head: Head, hidden_TD: Tensor, sequences: Sequence[ScoringSequence]) -> Tensor:
        keys = [(s.token_ids, s.positions) for s in sequences]
        of_each = dict(zip(keys, hidden_TD.split([len(s.positions) for s in sequences]), strict=True))
        missing = {key: rows for key, rows in of_each.items() if key not in self._others}
        if missing:
            found = head.without(torch.cat([*missing.values()]), self.moved_M)
            self._others |= zip(missing, found.split([len(rows) for rows in missing.values()], dim=1), strict=True)
            self._tokens += sum(len(tokens) for tokens, _ in missing)
        others_2T = torch.cat([self._others[key] for key in keys], dim=1)
        if self._tokens > MOST_TOKENS:
            self._others.clear()
            self._tokens = 0
        return others_2T


class _Part(NamedTuple):
    """Sequences of a table that are scored under the same probes."""

    table: LossTable
    sequences: tuple[ScoringSequence, ...]
    offsets: tuple[int, ...]
    """Of the table, for each of them."""
    first_rows: tuple[int, ...]
    slots: dict[int, int | None]
    """Probe -> slot."""


def _parts(scored: Sequence[Scored]) -> list[_Part]:
    of_probe: dict[tuple[int, int], list[Scored]] = {}
    for one in scored:
        of_probe.setdefault((id(one.table), one.probe), []).append(one)
    found: dict[tuple[int, tuple[int, ...]], _Part] = {}
    for (table_id, probe), some in of_probe.items():
        numbers, table = tuple(one.sequence for one in some), some[0].table
        part = found.setdefault((table_id, numbers), _Part(
            table,
            tuple(table.sequences[number] for number in numbers),
            tuple(table.offsets[number] for number in numbers),
            tuple(one.first_row for one in some),
            {},
        ))  # fmt: skip
        part.slots[probe] = some[0].slot
    return [*found.values()]


class _Batch:
    """T scored positions of some sequences, and all about them that no probe changes.

    Args:
        hidden_TD: float32, of the positions.
        others_2T: what the words that are not moved have there.
    """

    def __init__(self, head: Head, part: _Part, hidden_TD: Tensor, others_2T: Tensor, moved_M: Tensor) -> None:
        self._sequences, self._offsets = part.sequences, part.offsets
        self._hidden_TD, self._others_2T, self._moved_M = hidden_TD, others_2T, moved_M
        device = hidden_TD.device
        label_T = upload([label for s in part.sequences for label in s.label_ids], device)
        cells = [(first + i, len(s.label_ids)) for first, s in zip(part.offsets, part.sequences, strict=True)
                 for i in range(len(s.label_ids))]  # fmt: skip
        self._cells_2T = upload([[cell for cell, _ in cells], [cell + count for cell, count in cells]], device)
        """Of the table's columns, those of the labels and of the likeliest tokens."""
        self._place_T = torch.searchsorted(moved_M, label_T).clamp(max=len(moved_M) - 1)
        self._is_moved_T = moved_M[self._place_T] == label_T
        self._as_loaded_T = head.own_logits(hidden_TD, label_T)
        self.is_small = hidden_TD.numel() + len(hidden_TD) * len(moved_M) <= ROOM
        self._products_TM = head.products(hidden_TD, moved_M) if self.is_small else None

    def is_of(self, part: _Part) -> bool:
        return self._offsets == part.offsets and self._sequences == part.sequences

    def _chunks(self) -> Iterator[slice]:
        step = max(1, ROOM // len(self._moved_M))
        return (slice(first, first + step) for first in range(0, len(self._hidden_TD), step))

    def write(self, head: Head, part: _Part) -> None:
        for chunk in self._chunks():
            hidden_TD, cells_2T = self._hidden_TD[chunk], self._cells_2T[:, chunk]
            products_TM = self._products_TM  # of a batch that is small there is one chunk
            if products_TM is None:
                products_TM = head.products(hidden_TD, self._moved_M)
            for probe, slot in part.slots.items():
                logits_TM = head.with_adapter(products_TM, hidden_TD, self._moved_M, slot)
                part.table.cells_PC[probe, cells_2T] = self._log_probs(logits_TM, chunk)

    def _log_probs(self, logits_TM: Tensor, chunk: slice) -> Tensor:
        """(2, T) of the labels and the likeliest tokens."""
        others_total_T, others_best_T = self._others_2T[:, chunk]
        picked_T = logits_TM.gather(1, self._place_T[chunk].unsqueeze(1)).squeeze(1)
        target_T = torch.where(self._is_moved_T[chunk], picked_T, self._as_loaded_T[chunk])
        best_T = torch.maximum(others_best_T, logits_TM.amax(-1))
        return torch.stack([target_T, best_T]) - torch.logaddexp(others_total_T, logits_TM.logsumexp(-1))
