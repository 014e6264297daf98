"""The page table: which ZO slot holds which probe, and who still refers to it. Lives in the scheduler."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_zo.errors import SlotError


class SlotTable:
    """Hands out slots and refuses to hand one out again while a member refers to it.

    A slot is *pinned* by every member that names it and is not yet scheduled to the end of its prefill. After that the
    device executes forward and rewriting in order, so the slot may be given away.
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
        if self._owner[slot] is not None or self._pins[slot]:
            raise SlotError(f"slot {slot} is held by {self._owner[slot]} ({self._pins[slot]} members refer to it)")
        self._owner[slot] = owner
        self._pins[slot] = pins

    def unpin(self, slot: int) -> None:
        assert self._pins[slot] > 0, f"slot {slot} is not pinned"
        self._pins[slot] -= 1

    def release(self, owner: str, *, force: bool = False) -> None:
        """Give up all slots of `owner`. `force` is for a dropped group, whose members have been aborted."""
        for slot in [slot for slot, held_by in self._owner.items() if held_by == owner]:
            if self._pins[slot] and not force:
                raise SlotError(f"slot {slot} released by {owner} while {self._pins[slot]} members refer to it")
            self._owner[slot], self._pins[slot] = None, 0
