"""Hidden states that enter the first trained layer, kept from step to step.

A job that trains layers l and above leaves everything below l as it was loaded. So the hidden states that enter layer l
are a function of the tokens alone: the first step that computes them for a sequence keeps them, and later steps begin
that sequence at layer l.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import NamedTuple

from torch import Tensor

logger = logging.getLogger("vllm.zo.worker")


class Sequence(NamedTuple):
    """Names what is kept: the states of a job's sequence where they enter a layer."""

    owner: Hashable
    layer: int
    token_ids: tuple[int, ...]


class KeptStates:
    """The kept states of all jobs. A job's are dropped when it ends; what does not fit is not kept.

    Nothing is dropped to make room: a run goes through its examples in turn, so whatever was used longest ago would be
    what it needs next.

    Args:
        limit_bytes: most memory that the states take together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._states: dict[Sequence, Mapping[Hashable, Tensor]] = {}
        self._full: set[Hashable] = set()
        """Jobs that have been told that their states do not fit."""

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._states

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, sequence: Sequence) -> Mapping[Hashable, Tensor]:
        """Argument -> (rows of the sequence, ...)."""
        return self._states[sequence]

    def keep(self, sequence: Sequence, arguments: Mapping[Hashable, Tensor], rows: Tensor) -> None:
        """Keep what enters the layer for a sequence, if there is room for it.

        Args:
            arguments: of the layer's forward, by place or name: (rows of the forward, ...).
            rows: of the sequence among these.
        """
        size = len(rows) * sum(tensor[0].nbytes for tensor in arguments.values())
        if sequence in self._states:
            return
        if self.bytes + size > self.limit_bytes:
            self._tell(sequence.owner)
            return
        self._states[sequence] = {name: tensor.index_select(0, rows) for name, tensor in arguments.items()}
        self.bytes += size

    def _tell(self, owner: Hashable) -> None:
        if self.limit_bytes and owner not in self._full:
            self._full.add(owner)
            logger.info(
                "job %s: the hidden states of %d sequences fill %d MiB (zo_training.kept_states_mib); those of further "
                "ones are computed at each step",
                owner, len(self), self.limit_bytes >> 20,
            )  # fmt: skip

    def forget(self, owner: Hashable) -> None:
        """Drop what is kept for a job."""
        for sequence in [s for s in self._states if s.owner == owner]:
            self.bytes -= sum(tensor.nbytes for tensor in self._states.pop(sequence).values())
        self._full.discard(owner)

    def clear(self) -> None:
        """Drop everything, because the base weights are others now."""
        self._states.clear()
        self.bytes = 0
