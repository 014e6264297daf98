"""Scores on the device: from the hidden rows of members to the cells of loss tables.

Each cell belongs to one (probe, sequence, label). If vLLM preempts a member and runs it again, the member overwrites
its own cells, and nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vllm_zo.commands import ScoreMember
from vllm_zo.worker.head import Head
from vllm_zo.worker.loss_table import Entry, LossTable
from vllm_zo.worker.unmoved import Scored, UnmovedWords


class Present(NamedTuple):
    """A member under one of its probes, with `tokens` rows in this engine step. The first is row `first_row` of the
    hidden states."""

    member: ScoreMember
    probe: int
    table: LossTable
    first_row: int
    tokens: int
    slot: int | None = None
    """Slot of the probe's adapter, among all of vLLM's, if the adapter changes the LM head; else None."""
    unmoved: UnmovedWords | None = None
    """What is kept of the words that its job does not move, if it trains the LM head alone."""

    @property
    def is_scored_by_words(self) -> bool:
        """Whether `unmoved` can score it: it wants log-probabilities, and all of its sequence is in this step."""
        sequence = self.table.sequences[self.member.sequence]
        whole = self.member.num_computed_tokens == 0 and self.tokens == len(sequence.token_ids)
        return self.unmoved is not None and sequence.kind == "logprobs" and whole

    @property
    def scored(self) -> Scored:
        return Scored(self.table, self.probe, self.member.sequence, self.first_row, self.slot)


def score_members(head: Head, hidden: Tensor, members: Sequence[Present]) -> None:
    """Write the cells of all members that have target positions in this engine step.

    Args:
        hidden: (tokens of the step, D).
    """
    labels: list[Entry] = []
    logprobs: list[Entry] = []
    of_moved: dict[UnmovedWords, list[Scored]] = {}
    for present in members:
        sequence = present.table.sequences[present.member.sequence]
        if sequence.kind == "labels":
            labels += _entries(present)
        elif present.unmoved is not None and present.is_scored_by_words:
            of_moved.setdefault(present.unmoved, []).append(present.scored)
        elif sequence.kind == "logprobs":
            logprobs += _entries(present)
    if labels:
        head.score_labels(hidden, labels)
    if logprobs:
        head.score_logprobs(hidden, logprobs)
    for unmoved, scored in of_moved.items():
        unmoved.score(head, hidden, scored)


def scored_rows(present: Present) -> list[int]:
    """The rows of the hidden states at which a member is scored in this engine step, in order."""
    return sorted({entry.row for entry in _entries(present)})


def _entries(present: Present) -> list[Entry]:
    """The entries of a member, at those of its positions that have a row in this step.

    A sequence of kind "labels" has one position, where all its labels are scored. A sequence of kind "logprobs" has a
    label for each position, and its cells for the likeliest tokens follow its cells for the labels.
    """
    member, probe, table, first_row, tokens, slot, _ = present
    sequence = table.sequences[member.sequence]
    count = len(sequence.label_ids)
    first_cell = probe * table.cells_PC.shape[1] + table.offsets[member.sequence]
    positions = sequence.positions * count if sequence.kind == "labels" else sequence.positions
    wanted = zip(positions, sequence.label_ids, range(first_cell, first_cell + count), strict=True)
    # vLLM may compute a sequence in parts, over several steps: the rows of this step begin at position `start`.
    start = member.num_computed_tokens
    return [
        Entry(first_row + position - start, label, table, cell, cell + count, slot)
        for position, label, cell in wanted
        if start <= position < start + tokens
    ]
