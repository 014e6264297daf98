"""Where a client's Python code runs: in one process that talks through pipes. Between questions we stop it.

The kernel always enforces (grader_child.py): no second process, no network, one core, bounded memory and file sizes.
The process has an environment without our variables, and each answer has a time limit. With bubblewrap (`why_open` is
None) it also sees no other process and no file but Python's own, and can write only into a private directory in memory.
Without bubblewrap it can read what the user of the engine can read, /proc of others included.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

MEMORY_BYTES = 2 << 30
FILE_BYTES = 64 << 20
"""The limit for one file; with bubblewrap, for all files together."""
MAX_ANSWER_BYTES = 64 << 10
CHUNK = 64 << 10
PROBE_TIMEOUT_S = 10.0
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/alternatives")
"""Where Python loads libraries from, in addition to its own directories."""

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip
"""The whole environment of the process. Ours may hold API keys, so nothing of it goes there."""

_launcher = ThreadPoolExecutor(1, thread_name_prefix="zo-sandbox")
"""The thread that starts every process. The kernel ends each with the *thread* that started it (`--die-with-parent`,
and grader_child.py), and the threads that score rewards end with their group."""


@cache
def why_open() -> str | None:
    """None if bubblewrap isolates graders, else the reason why it cannot, for the log and `vllm-zo doctor`."""
    if shutil.which("bwrap") is None:
        return "bubblewrap (the program bwrap) is not installed"
    try:
        probe = subprocess.run(
            [*_bubblewrap(), sys.executable, "-I", "-c", "import json"],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_TIMEOUT_S, env=ENVIRONMENT,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not run here: {error}"
    if probe.returncode != 0:
        return f"bubblewrap does not run here: {probe.stderr.decode(errors='replace').strip()[-300:]}"
    return None


def _bubblewrap() -> list[str]:
    """The words that go in front of the command to isolate."""
    shown = [word for path in (*SYSTEM, *_python_directories()) for word in ("--ro-bind-try", path, path)]
    return [
        "bwrap", "--unshare-user", "--unshare-all", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL",
        "--die-with-parent", "--proc", "/proc", "--dev", "/dev",
        "--size", str(FILE_BYTES), "--tmpfs", "/tmp",  # before `shown`, or it would hide a Python that lives below /tmp
        *shown,
        "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--",
    ]  # fmt: skip


def _python_directories() -> list[str]:
    """The directories of the interpreter, its library and its packages, and of every symbolic link on the way."""
    # Every link: the sandbox executes the first name, and each step to the real file must be visible in it.
    found = [sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)]
    program = sys.executable
    while os.path.islink(program):
        program = os.path.normpath(os.path.join(os.path.dirname(program), os.readlink(program)))
        found.append(os.path.dirname(program))
    return list(dict.fromkeys(found))


class Sandbox:
    """One process that runs grader_child.py. One thread at a time may use it.

    Raises:
        OSError: on creation, if the process cannot start.
    """

    def __init__(self) -> None:
        isolated = why_open() is None
        directory = None if isolated else tempfile.TemporaryDirectory(prefix="vllm-zo-grader-")
        program = Path(__file__).with_name("grader_child.py").read_text(encoding="utf-8")
        command = [sys.executable, "-I", "-c", program, str(MEMORY_BYTES), str(FILE_BYTES)]
        self._process = _launcher.submit(
            subprocess.Popen,
            [*(_bubblewrap() if isolated else ()), *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT, bufsize=0,
            cwd=directory.name if directory else "/", start_new_session=True,
        ).result()  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        # A process that does not read must not block the writer beyond its time limit.
        os.set_blocking(self._input, False)
        # It holds the process and not the sandbox, so it runs when the sandbox is collected, or by `close()`.
        self.close = weakref.finalize(self, _end, self._process, directory)

    def ask(self, line: bytes, timeout_s: float) -> bytes:
        """Send one line and receive one. After an error the caller must close the process.

        Raises:
            TimeoutError: no whole line came within `timeout_s` seconds.
            OSError: the process has ended, has closed its pipe, or writes more than `MAX_ANSWER_BYTES`.
        """
        _signal(self._process, signal.SIGCONT)
        deadline = time.monotonic() + timeout_s
        unsent, answer = memoryview(line), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._input, selectors.EVENT_WRITE)
            selector.register(self._output, selectors.EVENT_READ)
            while b"\n" not in answer:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"did not answer within {timeout_s:g} s")
                for key, _ in ready:
                    if key.fd == self._output:
                        answer += self._read()
                        if len(answer) > MAX_ANSWER_BYTES:
                            raise OSError(f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
                    else:
                        unsent = unsent[self._write(unsent) :]
                        if not unsent:
                            selector.unregister(self._input)
        # Stopped until the next question: threads of the source would take processor time from the engine.
        _signal(self._process, signal.SIGSTOP)
        return bytes(answer)

    def _read(self) -> bytes:
        if not (chunk := os.read(self._output, CHUNK)):
            raise self._ended()
        return chunk

    def _write(self, unsent: memoryview) -> int:
        try:
            return os.write(self._input, unsent[:CHUNK])
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> OSError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)  # its pipes close a moment before it is gone
        status = self._process.returncode
        return OSError(
            "it closed the pipe of its answers" if status is None else f"its process ended (status {status})"
        )


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal the process and, with bubblewrap, the two between it and us. All are in one process group."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _end(process: subprocess.Popen[bytes], directory: tempfile.TemporaryDirectory[str] | None) -> None:
    _signal(process, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    if directory is not None:
        directory.cleanup()
