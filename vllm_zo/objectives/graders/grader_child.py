"""The process of a Python grader. sandbox.py passes the text of this file to `python -I -c`. It imports nothing of the
package, because the package need not be visible in the sandbox.

Every line of the protocol is one JSON value. The parent sends the source first, then [sample, item] for each call. The
process answers each with {"value": number} or {"error": text}.

Before the source runs, the process gives up what a grader does not need (`confine`). The source runs in the same
interpreter, so no restriction may depend on Python objects, which the source can reach. The kernel enforces all of
them.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, TextIO

MAX_ERROR_CHARACTERS = 1000
END_WITH_PARENT, NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 1, 38, 22, 2
"""Arguments of prctl(2): PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER."""
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""Instructions of classic BPF: load a word, three jumps that compare it with a constant, and return."""
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
CLONE_THREAD = 0x00010000
CALLS: dict[str, dict[str, Any]] = {
    "x86_64": {
        "architecture": 0xC000003E, "clone": 56, "clone3": 435,
        "refused": (57, 58, 41, 425, 109, 112, 203, 101, 310, 311, 62, 200, 234, 129, 297, 424),
    },
    "aarch64": {
        "architecture": 0xC00000B7, "clone": 220, "clone3": 435,
        "refused": (198, 425, 154, 157, 122, 117, 270, 271, 129, 130, 131, 138, 240, 424),
    },
}  # fmt: skip
"""Numbers of system calls. The filter refuses fork and vfork (x86-64 has them); socket and io_uring_setup; setpgid,
setsid and sched_setaffinity; ptrace, process_vm_readv and process_vm_writev; and the six that send signals. It allows
clone for threads only. A filter cannot see the flags of clone3, so clone3 answers "not implemented", and the C library
then uses clone."""


def confine(memory_bytes: int, file_bytes: int) -> None:
    """Restrict this process to itself: one core, no network, no child, bounded memory and files, and no life of its own
    once its parent has ended.

    Refusing setpgid and setsid makes sure that the signals of sandbox.py reach this process. Refusing sched_setaffinity
    keeps it on its core, so that the time limit of a call bounds its processor time too.

    Raises:
        OSError: this machine or kernel cannot do it.
    """
    # The core before the filter, which refuses sched_setaffinity. The one that it runs on: a new program starts on the
    # idlest core, and a fixed one may be that of the engine's busiest thread.
    os.sched_setaffinity(0, [ctypes.CDLL(None).sched_getcpu()])
    os.nice(10)
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    machine = CALLS.get(platform.machine())
    if machine is None:
        raise OSError(f"Python graders need Linux on x86-64 or AArch64, not {platform.machine()}")
    _install(_filter(machine))


def _filter(machine: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    """The instructions of a seccomp filter: (code, jump if true, jump if false, constant). A jump counts the
    instructions that it skips. The last three return EPERM, ENOSYS and "allowed"."""
    refused = machine["refused"]
    checks = [(EQUAL, len(refused) - index + 3, 0, number) for index, number in enumerate(refused)]
    return [
        (LOAD, 0, 0, 4),  # seccomp_data.arch
        (EQUAL, 0, len(checks) + 6, machine["architecture"]),  # in another, the numbers mean other calls
        (LOAD, 0, 0, 0),  # seccomp_data.nr
        (AT_LEAST, len(checks) + 4, 0, 0x40000000),  # x32, likewise
        *checks,
        (EQUAL, 4, 0, machine["clone3"]),
        (EQUAL, 0, 4, machine["clone"]),
        (LOAD, 0, 0, 16),  # seccomp_data.args[0], the flags
        (ANY_BIT, 2, 0, CLONE_THREAD),
        (RETURN, 0, 0, REFUSE | errno.EPERM),
        (RETURN, 0, 0, REFUSE | errno.ENOSYS),
        (RETURN, 0, 0, ALLOW),
    ]


def _install(instructions: list[tuple[int, int, int, int]]) -> None:
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("HP", len(instructions), ctypes.addressof(buffer)))
    library = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (END_WITH_PARENT, signal.SIGKILL, 0, 0, 0),
        (NO_NEW_PRIVILEGES, 1, 0, 0, 0),
        (SET_SECCOMP, FILTER, ctypes.addressof(program), 0, 0),
    ):
        if library.prctl(*(ctypes.c_ulong(argument) for argument in arguments)) != 0:
            raise OSError(ctypes.get_errno(), "this kernel has no seccomp filters, which Python graders need")


def serve(answers: TextIO) -> None:
    namespace: dict[str, Any] = {"__name__": "grader"}

    def load() -> None:
        exec(compile(json.loads(sys.stdin.readline()), "grader", "exec"), namespace)
        if not callable(namespace.get("grade")):
            raise TypeError("it defines no function grade(sample, item)")

    def grade(sample: Any, item: Any) -> float:
        return float(namespace["grade"](sample, item))

    def answer(function: Callable[..., Any], *arguments: Any) -> None:
        try:
            message = {"value": function(*arguments)}
        except BaseException as error:  # the source may also raise SystemExit and KeyboardInterrupt
            message = {"error": f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]}
        print(json.dumps(message), file=answers, flush=True)

    answer(load)
    for line in sys.stdin:
        answer(grade, *json.loads(line))


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the grader prints must not mix with the answers
    try:
        confine(*map(int, sys.argv[1:]))
    except OSError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        sys.exit(1)
    serve(answers)
