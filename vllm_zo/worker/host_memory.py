"""Freed memory goes back to the system while a job runs on CPU.

The token count of a step differs from the last one's, and so does the size of every tensor in it; oneDNN keeps a little
for each new count. glibc's heap then grows around what is kept: measured on an OPT-125M, 200 MB freed but still
resident after 160 steps. An engine that only serves grows likewise, more slowly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

TRIM_INTERVAL = 32
"""Steps between two calls. One takes some milliseconds, and pages in use again are faulted in again."""

_malloc_trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""glibc has it, musl and macOS have not."""


def give_back_freed_memory() -> None:
    """Release the free pages of all heaps; does nothing where the C library cannot."""
    if _malloc_trim is not None:
        _malloc_trim(0)
