"""What a coordinator actor and an engine actor say to each other beside the protocol of a job, and the line between
them."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from vllm_zo.engine.load_job import EngineFacts
from vllm_zo.entrypoints.cluster.on_ray.connect import NAMESPACE

logger = logging.getLogger("vllm.zo.cluster")


@dataclass(frozen=True)
class Hello:
    """To an engine: begin a new session, and say `Here` as soon as you are up."""


@dataclass(frozen=True)
class Here:
    """From an engine: it is up.

    Attributes:
        job_dir: of the job that an earlier coordinator gave it.
    """

    facts: EngineFacts
    job_dir: str | None


@dataclass(frozen=True)
class Crashed:
    """From an engine: why its process ends."""

    error: Exception


class Line:
    """The coordinator's line to one engine.

    Ray delivers the calls of one caller in order, or fails them. After a failed call, and when another process answers
    for the engine, a new *session* begins: both sides ignore what belongs to an earlier one.

    Attributes:
        life: the process that answers for the engine; None: none that is known.
        facts: of the engine in this session; None: it is not up yet.
        error: why the last process ended, if it could say.
        gone: whether the actor has died for good.
    """

    def __init__(self, name: str, actor: Any, actor_name: str) -> None:
        self.name, self.actor, self._actor_name = name, actor, actor_name
        self.life: str | None = None
        self.facts: EngineFacts | None = None
        self.error: Exception | None = None
        self.gone = False
        # Higher than any of a coordinator that was here before: it may still have calls under way.
        self.session = time.time_ns()
        self._number = 0
        self._pending: deque[Any] = deque()
        """Calls that have not been answered."""
        self.hello()

    def hello(self) -> None:
        """Begin a new session."""
        self.session, self._number = self.session + 1, 0
        self.facts = None
        self._pending.clear()
        self.tell([Hello()])

    def tell(self, messages: Sequence[Any]) -> None:
        self._call(messages)
        self._number += 1

    def check(self) -> None:
        """See that the engine is there; `broken` tells."""
        if self.life is None and not self._pending and not self.gone:
            self.hello()
        elif not self._pending:
            self._call(())

    def _call(self, messages: Sequence[Any]) -> None:
        if not self.gone:
            self._pending.append(self.actor.tell.remote(self.session, self._number, messages))

    def broken(self) -> bool:
        """Take in the answers that are here; returns whether a call has failed or another process has answered."""
        while self._pending and ray.wait([self._pending[0]], timeout=0)[0]:
            try:
                life = ray.get(self._pending.popleft())
            except ray.exceptions.RayActorError as error:
                logger.info("%s: %s", self.name, str(error).strip().split("\n", 1)[0])
                self._pending.clear()
                self.life, self.facts = None, None
                self.gone = not _exists(self._actor_name)
                return True
            if self.life is not None and self.life != life:
                self.life, self.facts = life, None
                return True
            self.life = life
        return False


def _exists(actor_name: str) -> bool:
    try:
        ray.get_actor(actor_name, NAMESPACE)
    except ValueError:
        return False
    return True


def end_this_actor() -> None:
    """End the actor that calls it, for good."""
    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
    time.sleep(5)
    os._exit(0)
