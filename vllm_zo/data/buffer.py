"""Which rows a step of a continual job draws: a function of the seed, of the policy, and of how many rows there were.

Rows are numbered in the order in which they came: first those that the job began with, then those that were appended.
Three policies keep at most `capacity` of them:

    newest      the newest rows
    reservoir   a uniform sample of all rows so far (Vitter's algorithm R, with counter-based random numbers)
    mixed       all rows that the job began with, and the newest that were appended: half of a mini-batch is of either

Whenever rows have been appended, what is kept is shuffled anew, and epochs begin again. So the rows of a step follow
from the seed, the number of appended rows, and the steps since they came.
"""

from __future__ import annotations

from collections.abc import Iterator

from vllm_zo import noise
from vllm_zo.config import BufferPolicy
from vllm_zo.data.batches import BatchOrder

RESERVOIR_STREAM, APPENDED_STREAM = "reservoir", "appended"


class Buffer:
    """The numbers of the rows that are kept.

    Args:
        capacity: the most rows that are kept; of "mixed", the most appended ones.
        first: rows that the job began with, at least `batch_size`.
        seed: of the job.
    """

    def __init__(self, policy: BufferPolicy, capacity: int, first: int, batch_size: int, seed: int) -> None:
        assert batch_size <= first and batch_size <= capacity
        self.policy, self.capacity, self.first, self.batch_size, self.seed = policy, capacity, first, batch_size, seed
        self.total = 0
        """Rows so far."""
        self._sample: list[int] = []
        """Of "reservoir": what is kept."""
        self.add(first)

    @property
    def appended(self) -> int:
        """Rows that were appended so far."""
        return self.total - self.first

    def add(self, count: int) -> None:
        """Note that `count` more rows have come."""
        if self.policy == "reservoir":
            for row in range(self.total, self.total + count):
                if row < self.capacity:
                    self._sample.append(row)
                elif (place := noise.derive_key(self.seed, RESERVOIR_STREAM, row) % (row + 1)) < self.capacity:
                    self._sample[place] = row
        self.total += count

    def kept(self) -> set[int]:
        """The rows that later steps may draw."""
        if self.policy == "reservoir":
            return set(self._sample)
        kept = set(self._newest())
        return kept | set(range(self.first)) if self.policy == "mixed" else kept

    def _newest(self) -> range:
        earliest = self.first if self.policy == "mixed" else 0
        return range(max(earliest, self.total - self.capacity), self.total)

    def batch(self, since: int) -> tuple[int, ...]:
        """(batch_size,) numbers of the rows that a step draws.

        Args:
            since: steps since rows were last appended, or since the beginning.
        """
        # Before anything is appended the order is that of a job whose rows never change.
        seed = noise.derive_key(self.seed, APPENDED_STREAM, self.appended) if self.appended else self.seed
        drawn: list[int] = []
        for rows, share in self._parts():
            drawn += (rows[i] for i in BatchOrder(len(rows), share, seed).batch(since))
        return tuple(drawn)

    def _parts(self) -> Iterator[tuple[range | list[int], int]]:
        """What a mini-batch consists of: rows, and how many of them."""
        if self.policy == "reservoir":
            yield self._sample, self.batch_size
            return
        newest = self._newest()
        if self.policy == "newest":
            yield newest, self.batch_size
            return
        fresh = min(self.batch_size - self.batch_size // 2, len(newest))
        if fresh < self.batch_size:
            yield range(self.first), self.batch_size - fresh
        if fresh:
            yield newest, fresh
