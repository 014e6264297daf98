"""Nothing that a test session starts outlives it, also where the session is killed.

A process of its own waits for the end of the session. Then it kills all that is left of the session's children and of
theirs: servers, engines, Ray. They are known by a variable of their environment, whatever their group or parent is.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

VARIABLE = "ZO_TEST_SESSION"
"""Holds the pid of the session that a process belongs to."""
_waiting: subprocess.Popen[bytes] | None = None
"""Kept, because a process object that is collected warns of a process that goes on."""


def hold() -> None:
    """Let all that this process starts from now on end with it. What it forks without a new program is not held."""
    global _waiting
    _waiting = subprocess.Popen(
        [sys.executable, "-S", __file__, str(os.getpid())],
        env={**os.environ, VARIABLE: ""},  # what waits belongs to no session: pytest-xdist has one in another
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,  # what is sent to the session's group must not reach it
    )  # fmt: skip
    os.environ[VARIABLE] = str(os.getpid())
    os.environ["SPT_NOENV"] = "1"  # vLLM names its processes; the new name would be written over the environment


def left(session: int) -> list[int]:
    """The processes of a session, but for the session's own."""
    mark, found = f"{VARIABLE}={session}".encode(), []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if mark in (directory / "environ").read_bytes().split(b"\0"):
                found.append(int(directory.name))
    return found


def main(session: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(session)], [], [])
    while pids := left(session):  # again: one may have been starting another
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
