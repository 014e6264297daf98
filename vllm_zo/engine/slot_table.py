"""The page table: which ZO slot holds which probe, and who still refers to it. Lives in the scheduler."""

from __future__ import annotations

from vllm_zo.errors import SlotError


class SlotTable:
    """Hands out slots and refuses to hand one out again while a member refers to it.

    A slot is *pinned* by every member that names it and is not yet scheduled to the end of its prefill. After that the
    device executes forward and rewriting in order, so the slot may be given away.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._pins = [0] * num_slots
        self._owner: list[str | None] = [None] * num_slots

    @property
    def free(self) -> list[int]:
        return [slot for slot in range(self.num_slots) if self._owner[slot] is None]

    def acquire(self, slot: int, owner: str, pins: int) -> None:
        if self._owner[slot] is not None or self._pins[slot]:
            raise SlotError(f"slot {slot} is held by {self._owner[slot]} ({self._pins[slot]} members refer to it)")
        self._owner[slot] = owner
        self._pins[slot] = pins

    def unpin(self, slot: int) -> None:
        assert self._pins[slot] > 0, f"slot {slot} is not pinned"
        self._pins[slot] -= 1

    def release(self, owner: str, *, force: bool = False) -> None:
        """Give up all slots of `owner`. `force` is for a dropped group, whose members have been aborted."""
        for slot in range(self.num_slots):
            if self._owner[slot] == owner:
                if self._pins[slot] and not force:
                    raise SlotError(f"slot {slot} released by {owner} while {self._pins[slot]} members refer to it")
                self._owner[slot], self._pins[slot] = None, 0
