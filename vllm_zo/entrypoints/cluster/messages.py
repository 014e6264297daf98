"""What a driver and an engine process say to each other beside the protocol of a job (`cluster/protocol.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_zo.config import JobConfig
from vllm_zo.engine.load_job import EngineFacts


class Pipe(Protocol):
    """The engine's end of what it hears its driver by: a `multiprocessing.Connection`, or what stands for one."""

    def send(self, message: Any) -> None: ...

    def recv(self) -> Any: ...

    def poll(self, timeout: float | None) -> bool:
        """Whether there is something to receive, after at most `timeout` seconds; None: however long it takes."""


@dataclass(frozen=True)
class StartEngine:
    """The first message: make this engine."""

    model: str
    options: Mapping[str, Any]
    """Keyword arguments of `LLM`, `zo_training` among them."""


@dataclass(frozen=True)
class Started:
    facts: EngineFacts


@dataclass(frozen=True)
class Call:
    """Call a method of the engine process. The next message that is no job's is the answer."""

    method: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Result:
    value: Any


@dataclass(frozen=True)
class Raised:
    """What a call, or the start of the engine, has raised."""

    error: Exception


@dataclass(frozen=True)
class State:
    """The state that a run gives back: what `evaluate(..., run=)` needs of the run in the process of an engine."""

    config: JobConfig
    version_file: Path
