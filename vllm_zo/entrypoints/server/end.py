"""SIGTERM ends the server within a bound, whatever a thread or the engine is doing.

vLLM ends its engine in a thread of the pool that everything else uses, and Python waits for all threads at its end. A
thread that reads a large file or waits for a grader would delay both. Nothing is lost if the process ends early: what
the server has answered is on disk, and jobs go on after the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from types import FrameType

import psutil

logger = logging.getLogger("vllm.zo.server")

END_S = 8.0
"""Time for the orderly end, in seconds: below the 10 s after which `docker stop` kills. `--shutdown-timeout`, during
which vLLM lets requests end, comes on top."""


def end_in_time(loop: asyncio.AbstractEventLoop, drain_s: float) -> None:
    """Let SIGTERM end this process within `END_S + drain_s` seconds. Call it after vLLM has set its own handlers.

    Args:
        drain_s: `--shutdown-timeout`, 0 unless the operator sets it.
    """
    limit_s = END_S + drain_s

    def on_sigterm() -> None:
        _end_after(limit_s)
        # The orderly way: vLLM treats both signals alike, and its handler for this one is still in place.
        signal.raise_signal(signal.SIGINT)

    # asyncio sets signal handlers in the main thread only; tests run apps in others.
    if threading.current_thread() is threading.main_thread():
        loop.add_signal_handler(signal.SIGTERM, on_sigterm)


def end_in_time_while_starting() -> None:
    """Let SIGTERM end this process within `END_S` seconds while its model is loading; `end_in_time` takes over once it
    serves. Call it in the main thread, after vLLM has set its handler for the start.

    That handler raises KeyboardInterrupt, and the process then waits for its engine. But an engine that is loading only
    notes a signal, and loads on.
    """
    interrupt = signal.getsignal(signal.SIGTERM)
    process = os.getpid()

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:  # an engine that was forked has this handler until it sets its own
            _end_after(END_S)
        if callable(interrupt):
            interrupt(number, frame)
        else:
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGTERM, on_sigterm)


def _end_after(limit_s: float) -> None:
    # A thread, not the loop's call_later: the loop may be what hangs.
    timer = threading.Timer(limit_s, _end, [limit_s])
    timer.daemon = True  # else a server that has ended in order would wait for it
    timer.start()


def _end(limit_s: float) -> None:
    logger.warning("the server has not ended within %g s of SIGTERM: it is ended now", limit_s)
    try:
        # The engine's processes first: they may hang as well, and would keep the accelerator's memory.
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # one may end with another that was killed before it
                child.kill()
    finally:
        # Not sys.exit: it ends this thread only, and at its end Python would wait for the others.
        os._exit(128 + signal.SIGTERM)
