"""Hidden states that enter the first trained layer, kept from step to step and from job to job.

A job that trains layers l and above leaves everything below l as it was loaded. So the hidden states that enter layer l
are a function of the tokens alone: the first step that computes them for a sequence keeps them, and later steps begin
that sequence at layer l. So do later jobs, of a search over learning rates for example.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

logger = logging.getLogger("vllm.zo.worker")


class Sequence(NamedTuple):
    """Names what is kept: the states of a sequence where they enter a layer.

    Attributes:
        owner: the job that asks. The states do not depend on it.
        rows: those that are kept, behind the last layer, where nothing but a row itself is read; None: all.
    """

    owner: Hashable
    layer: int
    token_ids: tuple[int, ...]
    rows: tuple[int, ...] | None = None


_Key = tuple[int, tuple[int, ...], tuple[int, ...] | None]


@dataclass
class _Kept:
    states: Mapping[Hashable, Tensor]
    jobs: set[Hashable]
    """Those that have asked for it and have not ended."""

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.states.values())


class KeptStates:
    """The kept states of all jobs. What no job uses stays until the room is needed; what does not fit is not kept.

    Nothing that a job uses is dropped to make room: a run goes through its examples in turn, so whatever was used
    longest ago would be what it needs next.

    Args:
        limit_bytes: most memory that the states take together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._kept: dict[_Key, _Kept] = {}
        self._unused: dict[_Key, None] = {}
        """Of `_kept`, what no job uses, in the order in which it became so."""
        self._full: set[Hashable] = set()
        """Jobs that have been told that their states do not fit."""

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def used(self) -> int:
        """How many sequences' states a job uses that has not ended."""
        return len(self._kept) - len(self._unused)

    def __getitem__(self, sequence: Sequence) -> Mapping[Hashable, Tensor]:
        """Argument -> (kept rows of the sequence, ...)."""
        return self._kept[sequence[1:]].states

    def claim(self, sequence: Sequence) -> bool:
        """Whether a sequence's states are kept. If so, they stay until its owner ends."""
        found = self._kept.get(sequence[1:])
        if found is None:
            return False
        found.jobs.add(sequence.owner)
        self._unused.pop(sequence[1:], None)
        return True

    def keep(self, sequence: Sequence, arguments: Mapping[Hashable, Tensor], rows: Tensor) -> None:
        """Keep what enters the layer for a sequence, if there is room for it.

        Args:
            arguments: of the layer's forward, by place or name: (rows of the forward, ...).
            rows: of the sequence, those to keep, among these.
        """
        if self.claim(sequence):
            return
        size = len(rows) * sum(tensor[0].nbytes for tensor in arguments.values())
        while self._unused and self.bytes + size > self.limit_bytes:
            self._drop(next(iter(self._unused)))
        if self.bytes + size > self.limit_bytes:
            self._tell(sequence.owner)
            return
        states = {name: tensor.index_select(0, rows) for name, tensor in arguments.items()}
        self._kept[sequence[1:]] = _Kept(states, {sequence.owner})
        self.bytes += size

    def _drop(self, key: _Key) -> None:
        del self._unused[key]
        self.bytes -= self._kept.pop(key).bytes

    def _tell(self, owner: Hashable) -> None:
        if self.limit_bytes and owner not in self._full:
            self._full.add(owner)
            logger.info(
                "job %s: the hidden states of %d sequences fill %d MiB (zo_training.kept_states_mib); those of further "
                "ones are computed at each step",
                owner, len(self), self.limit_bytes >> 20,
            )  # fmt: skip

    def ended(self, owner: Hashable) -> None:
        """Note that a job has ended: what no other uses may go when the room is needed."""
        for key, kept in self._kept.items():
            kept.jobs.discard(owner)
            if not kept.jobs:
                self._unused[key] = None
        self._full.discard(owner)

    def clear(self) -> None:
        """Drop everything, because the base weights are others now."""
        self._kept.clear()
        self._unused.clear()
        self.bytes = 0
