"""Gives freed memory back to the system while a job runs on a CPU.

The number of tokens changes from step to step, and with it the size of every tensor. oneDNN keeps some memory for each
new number, and glibc by itself does not release the free memory around it: after 160 steps of OPT-125M 200 MB were free
but still resident. The heap of an engine that only serves grows too, more slowly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

TRIM_INTERVAL = 32
"""Steps between two calls. A call takes some milliseconds, and memory that is used again costs page faults."""

_malloc_trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""None on musl and macOS, whose C libraries do not have it."""


def give_back_freed_memory() -> None:
    """Release the free memory of all heaps; does nothing where the C library cannot."""
    if _malloc_trim is not None:
        _malloc_trim(0)  # 0: keep no free memory at the top of the heap
