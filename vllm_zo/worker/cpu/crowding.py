"""Whether other programs want the cores of the model's threads, and how long those stay awake then.

A thread of GNU OpenMP that has nothing to do looks for work some thousand times before it sleeps (`GOMP_SPINCOUNT`). A
pause between two operators of a model is shorter than that, so the threads are there when the next operator begins.
Beside a busy program the same looking takes the core from the thread that the others wait for: a step takes nine times
as long, and twice if they sleep at once (docs/performance.md).

libgomp looks a hundred times only while a process has more OpenMP threads than cores. So while the machine is crowded,
a thread of ours holds a pool of OpenMP threads that sleep. How many threads compute does not change, nor do the bits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

LOOK_S = 0.5
"""Seconds between two looks. One reads a small file for each thread of the process, together some 0.5 to 1 ms."""
CROWDED = 0.5
"""Seconds a second that all threads together wait for a core: from here on the machine is crowded. Two threads on two
cores wait for 0.1 alone and for 1.0 beside a busy program."""
CROWDED_S = 5.0
"""Seconds for which it then counts as crowded. Threads that sleep between operators wait for a core at every wake, also
where nobody else is there, so only threads that stay awake can tell."""
TASKS = Path("/proc/self/task")
_ELEMENTS = 1 << 18
"""Enough that an operator on so many uses every thread (torch's grain is 1 << 15)."""


def waited_s(tasks: Path = TASKS) -> float:
    """Seconds for which threads of this process were ready to run and had no core; 0 where the system does not count.

    Args:
        tasks: has a directory for each thread.
    """
    total = 0
    for task in tasks.iterdir() if tasks.is_dir() else ():
        try:
            total += int((task / "schedstat").read_text().split()[1])
        except OSError:  # the thread has ended, or the kernel keeps no such file
            continue
    return total / 1e9


class SleepingPool:
    """A thread with a pool of OpenMP threads that sleep, until `end`."""

    def __init__(self) -> None:
        self._ended, self._made = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, name="zo-sleeping-pool", daemon=True)
        self._thread.start()
        self._made.wait()

    def _hold(self) -> None:
        torch.zeros(_ELEMENTS).add_(1)  # the first parallel operator of a thread makes its pool
        self._made.set()
        self._ended.wait()

    def end(self) -> None:
        """End the thread. Its pool ends with it."""
        self._ended.set()
        self._thread.join()


class Crowding:
    """Lets OpenMP's threads sleep soon while the machine is crowded. The thread that runs the model asks it to look."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, waited: Callable[[], float] = waited_s) -> None:
        self._clock, self._waited = clock, waited
        self._looked, self._before = clock(), waited()
        self._pool: SleepingPool | None = None

    @property
    def crowded(self) -> bool:
        return self._pool is not None

    def look(self) -> None:
        """Look whether the machine is crowded, every `LOOK_S`, and `CROWDED_S` after it was."""
        since = self._clock() - self._looked
        if since < (LOOK_S if self._pool is None else CROWDED_S):
            return
        waited = self._waited()
        share = (waited - self._before) / since
        self._looked, self._before = self._looked + since, waited
        if self._pool is not None:
            self._pool.end()
            self._pool = None
        elif share > CROWDED and torch.get_num_threads() > 1:
            self._pool = SleepingPool()
