"""`def grade(sample, item) -> float` from source text, in a child process with limits.

The child keeps the engine safe from mistakes (an endless loop, a huge list, `sys.exit`), not from malice: it runs as
the same user. Hence a python grader is refused unless whoever runs the engine allows it.
"""

from __future__ import annotations

import json
import math
import selectors
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.graders.base import GraderResult

TIMEOUT_S = 10.0
START_TIMEOUT_S = 30.0
"""For the child to start and run the module's top level, imports included."""
MEMORY_BYTES = 2 << 30
MAX_SOURCE_BYTES = 256 << 10
"""As OpenAI's."""

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""All of it: ours may hold keys. One thread, because the cores are the engine's."""

_CHILD = """
import json, os, resource, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the grader prints goes to the log
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
def answer(**message):
    print(json.dumps(message), file=answers, flush=True)
def call(function, *arguments):
    try:
        return {"value": function(*arguments)}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"}
namespace = {"__name__": "grader"}
def load():
    exec(compile(json.loads(sys.stdin.readline()), "grader", "exec"), namespace)
    if not callable(namespace.get("grade")):
        raise TypeError("it defines no function grade(sample, item)")
def grade(sample, item):
    return float(namespace["grade"](sample, item))
answer(**call(load))
for line in sys.stdin:
    answer(**call(grade, *json.loads(line)))
"""


class PythonGrader:
    """Owns one child process, started on first use, ended with the grader, replaced after a time-out or a crash."""

    item_fields: frozenset[str] = frozenset()

    def __init__(self, name: str, source: str, timeout_s: float = TIMEOUT_S) -> None:
        self.name, self.source, self.timeout_s = name, source, timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._end_child: Callable[[], Any] = _nothing
        self._lock = threading.Lock()

    def __call__(self, sample_text: str, item: Mapping[str, Any]) -> GraderResult:
        sample = {"output_text": sample_text, "output_json": _parsed(sample_text)}
        with self._lock:
            try:
                child = self._child or self._start()
                answer = self._ask(child, [sample, dict(item)], self.timeout_s)
            except TimeoutError as error:
                return GraderResult.failed("unresponsive_reward_error", str(error))
            except ConfigError as error:
                return GraderResult.failed("python_grader_runtime_error", str(error))
            except OSError as error:
                return GraderResult.failed("python_grader_server_error", str(error))
        if "error" in answer:
            return GraderResult.failed("python_grader_runtime_error", answer["error"])
        if not math.isfinite(answer["value"]):
            return GraderResult.failed("python_grader_runtime_error", f"grade returned {answer['value']}")
        return GraderResult(answer["value"])

    def _start(self) -> subprocess.Popen[bytes]:
        """A fresh child with the source loaded, isolated (-I) from our environment and working directory's modules.

        Raises:
            ConfigError: the source does not run, or defines no `grade`.
        """
        self._child = child = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, str(MEMORY_BYTES)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_ENVIRONMENT,
        )  # fmt: skip
        self._end_child = weakref.finalize(self, _end, child)
        answer = self._ask(child, self.source, START_TIMEOUT_S)
        if "error" in answer:
            self.close()
            raise ConfigError(f"the source of python grader {self.name!r} does not load: {answer['error']}")
        return child

    def _ask(self, child: subprocess.Popen[bytes], message: Any, timeout_s: float) -> dict[str, Any]:
        """One line there, one line back.

        Raises:
            TimeoutError: no answer in time; the child is ended.
            OSError: the child died.
        """
        assert child.stdin is not None and child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            try:
                child.stdin.write(json.dumps(message, default=str).encode() + b"\n")
                child.stdin.flush()
                in_time = bool(selector.select(timeout_s))
                line = child.stdout.readline() if in_time else b""
            except BrokenPipeError:
                in_time, line = True, b""
        if not line:
            self.close()
            if in_time:
                raise OSError(f"the process of python grader {self.name!r} ended (status {child.returncode})")
            raise TimeoutError(f"python grader {self.name!r} did not answer within {timeout_s:g} s")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the child; the next call starts another."""
        self._end_child()
        self._child = None


def _nothing() -> None: ...


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.communicate()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def python_grader(where: str, spec: Mapping[str, Any]) -> PythonGrader:
    """Checks that the source compiles and is not too long; it first runs when the first sample is graded.

    Raises:
        ConfigError: it does not compile, or is too long.
    """
    source = spec["source"]
    if not isinstance(source, str) or len(source.encode()) > MAX_SOURCE_BYTES:
        raise ConfigError(f"{where}.source: expected Python source of at most {MAX_SOURCE_BYTES >> 10} KiB.")
    try:
        compile(source, "grader", "exec")
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{where}.source: not Python: {error}.") from None
    if "image_tag" in spec:
        raise ConfigError(f"{where}.image_tag={spec['image_tag']!r}: graders run in this machine's Python; drop it.")
    return PythonGrader(spec["name"], source)
