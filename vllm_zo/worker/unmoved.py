"""What the words that a job does not move add to a softmax, kept for each scored sequence.

A job that trains the LM head alone leaves the hidden states as they are, and with `u="written"` it moves the rows of
some words only. What the others have, the log of the sum of their exponentials and their largest logit, is then the
same at every step and for every probe: it is computed once a position, and a step multiplies with the moved rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_zo.objectives.base import ScoringSequence
from vllm_zo.worker.head import Head
from vllm_zo.worker.loss_table import Entry


class UnmovedWords:
    """Scores sequences of a job as `Head.score_logprobs` does, with products of the moved rows alone.

    Args:
        moved_M: token ids of the words that the job moves, ascending.
    """

    def __init__(self, moved_M: Tensor) -> None:
        self.moved_M = moved_M
        self._kept: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
        """Tokens and scored positions of a sequence -> (2, positions): log of the sum, largest logit."""

    def score(self, head: Head, hidden: Tensor, scored: Sequence[tuple[ScoringSequence, Sequence[Entry]]]) -> None:
        """Write the cells of whole sequences. hidden: (tokens of the step, D).

        Args:
            scored: each sequence with its entries, one for each of its positions.
        """
        keys = [(tuple(sequence.token_ids), tuple(sequence.positions)) for sequence, _ in scored]
        missing = {key: entries for key, (_, entries) in zip(keys, scored, strict=True) if key not in self._kept}
        if missing:
            rows = [entry.row for entries in missing.values() for entry in entries]
            found = head.without(hidden, rows, self.moved_M)
            self._kept |= zip(missing, found.split([len(entries) for entries in missing.values()], dim=1), strict=True)
        entries = [entry for _, of_sequence in scored for entry in of_sequence]
        head.score_logprobs(hidden, entries, self.moved_M, torch.cat([self._kept[key] for key in keys], dim=1))
