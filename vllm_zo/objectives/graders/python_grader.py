"""`def grade(sample, item) -> float` from source text, in a process of its own (sandbox.py).

The server refuses it unless its owner allowed it at the start, because without bubblewrap the process can read what the
user of the engine can read.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.graders.base import GraderResult
from vllm_zo.objectives.graders.sandbox import Sandbox

TIMEOUT_S = 10.0
"""The longest time for one sample."""
START_TIMEOUT_S = 30.0
"""The longest time for the process to start and to run the source's top level, imports included."""
MAX_SOURCE_BYTES = 256 << 10
"""The limit of OpenAI's API."""


class PythonGrader:
    """It owns one process. The process starts on first use and ends with the grader. After a time-out or a crash the
    next call starts another."""

    item_fields: frozenset[str] = frozenset()

    def __init__(self, name: str, source: str, timeout_s: float = TIMEOUT_S) -> None:
        self.name, self.source, self.timeout_s = name, source, timeout_s
        self._sandbox: Sandbox | None = None
        self._lock = threading.Lock()

    def __call__(self, sample_text: str, item: Mapping[str, Any]) -> GraderResult:
        sample = {"output_text": sample_text, "output_json": _parsed(sample_text)}
        # One question at a time: the pipe has no ids, so answers of two threads could be exchanged.
        with self._lock:
            try:
                sandbox = self._sandbox or self._start()
                return GraderResult(self._ask(sandbox, [sample, dict(item)], self.timeout_s))
            except TimeoutError as error:
                self.close()
                return self._failed("unresponsive_reward_error", error)
            except OSError as error:
                self.close()
                return self._failed("python_grader_server_error", error)
            except ConfigError as error:
                return self._failed("python_grader_runtime_error", error)

    def _failed(self, flag: str, error: Exception) -> GraderResult:
        return GraderResult.failed(flag, f"python grader {self.name!r}: {error}")

    def _start(self) -> Sandbox:
        """A fresh process that has loaded the source.

        Raises:
            ConfigError: the source does not run, or defines no `grade`.
            OSError: the process cannot start, or has ended.
            TimeoutError: the source did not load within START_TIMEOUT_S.
        """
        self._sandbox = sandbox = Sandbox()
        try:
            self._ask(sandbox, self.source, START_TIMEOUT_S, none=True)
        except ConfigError as error:
            self.close()
            raise ConfigError(f"the source does not load: {error}") from None
        return sandbox

    def _ask(self, sandbox: Sandbox, message: Any, timeout_s: float, none: bool = False) -> float:
        """The number that the process answers. With `none` the answer null is right, and the result is 0.

        Raises:
            ConfigError: the source raised, or the process answered something else.
            TimeoutError, OSError: see `Sandbox.ask`.
        """
        line = sandbox.ask(json.dumps(message, default=str).encode() + b"\n", timeout_s)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        match answer:
            case {"error": str(why)}:
                raise ConfigError(why)
            case {"value": None} if none:
                return 0.0
            case {"value": float(value)} if math.isfinite(value):
                return value
            case {"value": float(value)}:
                raise ConfigError(f"grade returned {value}: expected a finite number")
        # The source itself wrote into the pipe, so the next line may be another such text: start afresh.
        self.close()
        raise ConfigError(f"it wrote {line[:60]!r} in place of an answer: expected one finite number from grade")

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def python_grader(where: str, spec: Mapping[str, Any]) -> PythonGrader:
    """Build the grader, and check that the source compiles and is not too long. It does not run yet.

    Raises:
        ConfigError: the source does not compile, is too long, or asks for an image.
    """
    source = spec["source"]
    if not isinstance(source, str) or len(source.encode("utf-8", "replace")) > MAX_SOURCE_BYTES:
        raise ConfigError(f"{where}.source: expected Python source of at most {MAX_SOURCE_BYTES >> 10} KiB.")
    try:
        compile(source, "grader", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        raise ConfigError(f"{where}.source: not Python: {error}.") from None
    if "image_tag" in spec:
        raise ConfigError(f"{where}.image_tag={spec['image_tag']!r}: graders run in this machine's Python; drop it.")
    return PythonGrader(spec["name"], source)
