"""Which group holds which ZO slot, and how many members still refer to it. The table lives in the scheduler."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_zo.errors import SlotError


class SlotTable:
    """Hands out slots and refuses to hand one out again while a member refers to it.

    Every member *pins* its slot until it is scheduled to the end of its prefill. After that the device executes its
    forward before it rewrites the slot, so another group may take the slot. Handing out a pinned slot would score a
    member with the weights of another probe.
    """

    def __init__(self, slots: Iterable[int]) -> None:
        self._owner: dict[int, str | None] = dict.fromkeys(slots)
        self._pins = dict.fromkeys(self._owner, 0)

    def __len__(self) -> int:
        return len(self._owner)

    @property
    def free(self) -> list[int]:
        return [slot for slot, owner in self._owner.items() if owner is None]

    def acquire(self, slot: int, owner: str, pins: int) -> None:
        """Give a slot to `owner`, pinned by `pins` members. Raises SlotError: the slot is held or pinned."""
        if self._owner[slot] is not None or self._pins[slot]:
            raise SlotError(f"slot {slot} is held by {self._owner[slot]} ({self._pins[slot]} members refer to it)")
        self._owner[slot] = owner
        self._pins[slot] = pins

    def unpin(self, slot: int) -> None:
        assert self._pins[slot] > 0, f"slot {slot} is not pinned"
        self._pins[slot] -= 1

    def release(self, owner: str, *, force: bool = False) -> None:
        """Free all slots of `owner`.

        Args:
            force: for a dropped group, whose members the scheduler aborts.

        Raises:
            SlotError: a member refers to one of the slots, without `force`.
        """
        for slot in [slot for slot, held_by in self._owner.items() if held_by == owner]:
            if self._pins[slot] and not force:
                raise SlotError(f"slot {slot} released by {owner} while {self._pins[slot]} members refer to it")
            self._owner[slot], self._pins[slot] = None, 0
