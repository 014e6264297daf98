"""Who scores what: works on lease to engines, works whose engine has gone, and works that are late."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from dataclasses import dataclass, field

from vllm_zo.engine.group import Work

IN_HAND = 2
"""Works that an engine has at most: one to score, and the next, so that it need not wait for a message between them."""
LATE_FACTOR, LATE_AT_LEAST_S = 3.0, 0.05
"""A work is late after this many times the median time of the latest ones. It is then given to an idle engine, too."""
LOST_FACTOR, LOST_AT_LEAST_S = 30.0, 5.0
"""After this long its answer counts as lost, and the work is given out anew, if need be to the same engine."""
SAMPLE = 64
"""Number of the latest times in the median."""


@dataclass(eq=False)
class Lease:
    """A work that has no answer yet, and the engines that have it, with the time at which each got it."""

    number: int
    work: Work
    opened_at: float
    holders: dict[str, float] = field(default_factory=dict)
    dropped: bool = False
    """Whether the answer does not count any more. Its holders have it in hand all the same."""


class Leases:
    """All works without an answer. Times are seconds on one clock, which the caller reads.

    A step of a thousand shards has a thousand answers, so none of them may cost a look at all leases.
    """

    def __init__(self) -> None:
        self._held: dict[int, Lease] = {}
        """Number -> lease that somebody holds, in the order in which they were last given."""
        self._returned: deque[Lease] = deque()
        """Leases that nobody holds any more: they are given out before any new work."""
        self._in_hand: Counter[str] = Counter()
        self._number = 0
        self._seconds: deque[float] = deque(maxlen=SAMPLE)
        self._median = 0.0

    def in_hand(self, engine: str) -> int:
        return self._in_hand[engine]

    def open(self, work: Work, now: float) -> Lease:
        """A lease on new work, to be given to somebody."""
        self._number += 1
        return Lease(self._number, work, now)

    def returned(self) -> Lease | None:
        """The next lease that nobody holds any more, to be given to somebody."""
        return self._returned.popleft() if self._returned else None

    def give_back(self, lease: Lease) -> None:
        """Take back a lease for which nobody has room; it comes next."""
        self._returned.appendleft(lease)

    def give(self, lease: Lease, engine: str, now: float) -> None:
        lease.holders[engine] = now
        self._in_hand[engine] += 1
        self._held.pop(lease.number, None)
        self._held[lease.number] = lease

    def answered(self, number: int, engine: str, now: float) -> Lease | None:
        """End a lease; None: it has an answer already, or none was ever given."""
        lease = self._held.pop(number, None)
        if lease is None:  # an answer that was thought lost may be to one that was given back
            lease = next((returned for returned in self._returned if returned.number == number), None)
            if lease is None:
                return None
            self._returned.remove(lease)
        if lease.dropped:
            self._in_hand.subtract(lease.holders.keys())
            return None
        self._in_hand.subtract(lease.holders.keys())
        if (given := lease.holders.get(engine)) is not None:
            self._seconds.append(now - given)
            self._median = statistics.median(self._seconds)
        return lease

    def leave(self, engine: str) -> None:
        """Take all leases back from an engine that has gone."""
        del self._in_hand[engine]
        for lease in list(self._held.values()):
            if lease.holders.pop(engine, None) is not None and not lease.holders:
                self._return(lease)

    def drop_step(self) -> None:
        """Let no answer count any more that belongs to a training step: it goes on without them."""
        for lease in [*self._held.values(), *self._returned]:
            lease.dropped = lease.dropped or lease.work.trains
        self._returned = deque(lease for lease in self._returned if not lease.dropped)

    def clear(self) -> None:
        self._held.clear()
        self._returned.clear()
        self._in_hand.clear()

    def _return(self, lease: Lease) -> None:
        del self._held[lease.number]
        if not lease.dropped:
            self._returned.append(lease)

    # --- lateness -----------------------------------------------------------------------------------------------------

    def late(self, now: float) -> list[Lease]:
        """Leases that an idle engine should take as well, the oldest first."""
        found = []
        for lease in self._held.values():
            if now < _last(lease) + self._late_after:
                break
            if not lease.dropped:
                found.append(lease)
        return found

    def take_back_lost(self, now: float) -> None:
        """Treat leases whose answer must be lost as if nobody had ever had them."""
        for lease in list(self._held.values()):
            if now < _last(lease) + self._lost_after:
                break
            self._in_hand.subtract(lease.holders.keys())
            lease.holders.clear()
            self._return(lease)

    def next_late(self, now: float) -> float | None:
        """When, after `now`, a lease becomes late or lost; None: nobody holds one."""
        if not self._held:
            return None
        oldest = next(iter(self._held.values()))
        late, lost = _last(oldest) + self._late_after, _last(oldest) + self._lost_after
        return late if now < late else lost

    @property
    def _late_after(self) -> float:
        # Before the first answer nothing tells how long a work takes: the first forward of an engine may be slow.
        return max(LATE_AT_LEAST_S, LATE_FACTOR * self._median) if self._seconds else LOST_AT_LEAST_S

    @property
    def _lost_after(self) -> float:
        return max(LOST_AT_LEAST_S, LOST_FACTOR * self._median)


def _last(lease: Lease) -> float:
    """When the lease was last given to somebody."""
    return max(lease.holders.values())
