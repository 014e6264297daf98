"""How workers in another process learn that a request has come, while they run a forward: a byte of shared memory.

The engine's input thread rings. The workers look between layers, and stop. What a look costs is reading a byte.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable

logger = logging.getLogger("vllm.zo")


class Doorbell:
    """The engine's end.

    Attributes:
        path: opens the byte in any process of this machine that is the same user's, while this object lives.

    Raises:
        AttributeError: the system is not Linux (`possible`).
    """

    possible = hasattr(os, "memfd_create")

    def __init__(self) -> None:
        # Memory without a name in any folder: nothing is left of it, however the process ends.
        self._file = os.fdopen(os.memfd_create("vllm-zo-doorbell"), "r+b")
        self._file.truncate(1)
        self._byte = mmap.mmap(self._file.fileno(), 1)
        self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        self._rung = self._answered = self._renewed = 0

    def ring(self) -> None:
        """Note that a request comes. Any thread may call it, but always the same one."""
        self._rung += 1
        self._byte[0] = 1

    def answer(self) -> None:
        """Note that a request that has rung is with the scheduler now."""
        self._answered = min(self._answered + 1, self._rung)

    def renew(self) -> None:
        """Let the byte say whether a request has rung that is not answered. To be called before a forward begins.

        Between two steps the engine takes in all that has come. So one that rang before the last call and is not
        answered will never be: vLLM has refused it on its way. It must not stop every forward from now on.
        """
        self._answered, self._renewed = max(self._answered, self._renewed), self._rung
        self._byte[0] = 0  # first: one that rings from here on is heard
        if self._rung > self._answered:
            self._byte[0] = 1


def listen(path: str) -> Callable[[], bool]:
    """Returns a function that says whether somebody has rung."""
    try:
        with open(path, "r+b") as file:
            byte = mmap.mmap(file.fileno(), 1)
    except OSError as error:  # no reason to end an engine that serves
        logger.warning("training does not stop between layers for a request: %s", error)
        return lambda: False
    return lambda: byte[0] == 1
