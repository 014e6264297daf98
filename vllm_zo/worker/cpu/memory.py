"""What becomes of memory that a CPU worker has freed: it stays for the next forward, and goes back to the system from
time to time while a job runs.

glibc by itself gives free memory at the top of a heap back at once where it is much, and each output of a prompt of
2,048 tokens is faulted in anew, page by page.

The number of tokens changes from step to step, and with it the size of every tensor. oneDNN keeps some memory for each
new number, and glibc by itself does not release the free memory around it: after 160 steps of OPT-125M 200 MB were free
but still resident. The heap of an engine that only serves grows too, more slowly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

TRIM_INTERVAL = 32
"""Steps between two calls. A call takes some milliseconds, and memory that is used again costs page faults."""

KEPT_BYTES = 256 << 20
"""As much free memory stays at the top of a heap, and blocks up to this size lie in heaps."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

_mallopt: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
_malloc_trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""None on musl and macOS, whose C libraries do not have them."""


def keep_freed_memory() -> None:
    """Let the next forward have the memory that one frees; does nothing where the C library cannot. For a worker that
    has loaded its model: what loading frees should go."""
    give_back_freed_memory()
    if _mallopt is not None:
        _mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        _mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)


def give_back_freed_memory() -> None:
    """Release the free memory of all heaps; does nothing where the C library cannot."""
    if _malloc_trim is not None:
        _malloc_trim(0)  # 0: keep no free memory at the top of the heap
