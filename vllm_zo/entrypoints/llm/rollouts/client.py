"""The client of an engine whose job plays rollouts: whoever waits for the job also moves them on."""

from __future__ import annotations

import logging
import time
from collections.abc import Coroutine
from contextlib import ExitStack
from typing import Any

from vllm_zo.entrypoints.llm.client import POLL_INTERVAL_S, EngineClient
from vllm_zo.entrypoints.llm.rollouts.loop_thread import LoopThread
from vllm_zo.entrypoints.llm.rollouts.opened import OpenedRollouts
from vllm_zo.entrypoints.llm.rollouts.pool import RolloutPool
from vllm_zo.entrypoints.llm.rollouts.programs import Program, program_of
from vllm_zo.entrypoints.llm.rollouts.server import LocalServer
from vllm_zo.entrypoints.llm.rollouts.transcripts import Transcripts
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives import Rollout

logger = logging.getLogger("vllm.zo")

START_S, CLOSE_S = 120.0, 10.0
"""Longest wait for the server to start, and for it or the rollouts to end, in seconds."""


class RolloutClient(EngineClient):
    """`EngineClient` that plays the rollouts of one job while it advances; a context manager.

    Three threads work together. The one that waits for the job calls `advance` and owns the engine. One serves vLLM's
    OpenAI routes. One runs the programs: a program that blocks its loop does not keep the server from answering it.
    """

    def __init__(self, llm_engine: Any, directory: JobDir, objective: Rollout) -> None:
        super().__init__(llm_engine)
        self._directory, self._objective = directory, objective
        self._opened = OpenedRollouts()
        self._playing: ExitStack | None = None
        self._asked_at = 0.0

    def __enter__(self) -> RolloutClient:
        """Start the server and the programs' thread.

        Raises:
            ConfigError: the program cannot be imported here, or an argument of the server is unknown.
            JobError: the server does not start.
        """
        from vllm_zo.entrypoints.llm.rollouts.front_end import Core, FrontEnd

        self._engine = Core(self._core, self._step if self.in_process else None, self.llm_engine.get_supported_tasks())
        front_end = FrontEnd(self.llm_engine, self._engine)
        self._server = LocalServer(front_end, self._opened, self._objective.server)
        program = program_of(self._objective, self._server.url)
        with ExitStack() as stack:
            served, self._programs = LoopThread("zo-rollout-server"), LoopThread("zo-rollouts")
            stack.callback(served.close)
            stack.callback(self._programs.close)
            stack.callback(lambda: served.call(self._stop(front_end), CLOSE_S))
            served.call(self._server.start(), START_S)
            stack.callback(lambda: self._end(program.close()))
            self._pool: RolloutPool = self._programs.call(self._make_pool(program), CLOSE_S)
            stack.callback(lambda: self._end(self._pool.close()))
            self._playing = stack.pop_all()
        return self

    def _end(self, coroutine: Coroutine[Any, Any, None]) -> None:
        try:
            self._programs.call(coroutine, CLOSE_S)
        except TimeoutError:
            logger.warning("a program of rollouts blocks its event loop: its thread is left behind")

    async def _stop(self, front_end: Any) -> None:
        await self._server.stop()
        front_end.shutdown()

    async def _make_pool(self, program: Program) -> RolloutPool:
        train, validation = self._directory.read_train(), self._directory.read_validation()
        transcripts, wake = Transcripts(self._directory), self._engine.wake
        return RolloutPool(self._objective, program.play, self._opened, train, validation, transcripts, wake)

    def __exit__(self, *exception: object) -> None:
        assert self._playing is not None
        playing, self._playing = self._playing, None
        playing.close()

    def advance(self) -> bool:
        if self._playing is None:
            return super().advance()
        self._exchange()
        if self.in_process:
            return self._engine.turn()
        until = time.monotonic() + POLL_INTERVAL_S
        while time.monotonic() < until:
            self._engine.turn()
            self._exchange()
        return True

    def _exchange(self) -> None:
        """Tell the engine what the rollouts have brought, and fetch the next ones."""
        answers = self._pool.take_answers()
        # While rollouts are played, only a cancelled group is news.
        if not answers and self._pool.playing and time.monotonic() - self._asked_at < POLL_INTERVAL_S:
            return
        self._asked_at = time.monotonic()
        handed_out = self.call("zo_rollouts", self._directory.job_id, answers)
        if handed_out["rollouts"]:
            self._server.serve_probes({(one["model"], one["path"]) for one in handed_out["rollouts"]})
        self._programs.soon(self._pool.take, handed_out)
