"""Lanes: the engine's room for jobs that run together, and who is served next.

A lane is a fixed share of the ZO slots and at most one open group. Jobs beyond the lanes queue. Tokens are shared by
fair queueing: the lane that was given the fewest goes first, and a job that enters starts level with the lowest, so
that nobody is owed for the time before.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_zo.engine.group import PerturbationGroup
from vllm_zo.engine.job import Job
from vllm_zo.engine.slot_table import SlotTable


class Lane:
    """Room for one running job.

    Attributes:
        slots: the lane's share of the ZO slots.
        job: who has the lane; None while it is free.
        group: the job's open group, from the scheduling of its first member to that of its last.
        tokens: member tokens scheduled, the currency of fair sharing.
    """

    def __init__(self, first_slot: int, num_slots: int) -> None:
        self.slots = SlotTable(range(first_slot, first_slot + num_slots))
        self.job: Job | None = None
        self.group: PerturbationGroup | None = None
        self.tokens = 0

    def leave(self) -> None:
        """The lane's job ended or rests; its slots are free."""
        assert self.group is None and len(self.slots.free) == len(self.slots)
        self.job = None


def make_lanes(count: int, slots_per_lane: int) -> list[Lane]:
    return [Lane(i * slots_per_lane, slots_per_lane) for i in range(count)]


def enter(lanes: Sequence[Lane], job: Job) -> bool:
    """Give `job` a free lane; false when there is none."""
    free = next((lane for lane in lanes if lane.job is None), None)
    if free is None:
        return False
    free.tokens = min((lane.tokens for lane in lanes if lane.job is not None), default=0)
    free.job = job
    return True


def by_need(lanes: Sequence[Lane]) -> list[Lane]:
    """Occupied lanes, the one that was given least first."""
    return sorted((lane for lane in lanes if lane.job is not None), key=lambda lane: lane.tokens)
