"""Plays the rollouts of one job: some at the same time, each within its time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from vllm_zo.entrypoints.llm.rollouts.opened import OpenedRollout, OpenedRollouts
from vllm_zo.entrypoints.llm.rollouts.transcripts import Transcripts
from vllm_zo.objectives import EncodedExample, Rollout

logger = logging.getLogger("vllm.zo")

PlayOne = Callable[[OpenedRollout, dict[str, Any]], Awaitable[Any]]
"""(a rollout, its row) -> what the program returned."""
Answer = tuple[str, int, int, float | None, str]
"""The fields of the engine's `Answer`: group, probe, sequence, reward, error."""


class RolloutPool:
    """Everything but `take_answers` belongs to one event loop.

    Args:
        train, validation: the rows of the job.
        transcripts: keep what is said in some of the rollouts.
        answered: is called after every rollout that has ended; any thread may have to notice.
    """

    def __init__(
        self,
        objective: Rollout,
        play: PlayOne,
        opened: OpenedRollouts,
        train: Sequence[EncodedExample],
        validation: Sequence[EncodedExample],
        transcripts: Transcripts,
        answered: Callable[[], None],
    ) -> None:
        self._objective, self._play, self._opened = objective, play, opened
        self._transcripts = transcripts
        self._rows = {True: train, False: validation}
        self._answered = answered
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._places = asyncio.Semaphore(objective.concurrency)
        self._tasks: dict[asyncio.Task[None], str] = {}
        """Task of a rollout -> its group."""

    @property
    def playing(self) -> bool:
        return bool(self._tasks)

    def take_answers(self) -> list[Answer]:
        """The answers since the last call, in any thread."""
        answers = []
        with contextlib.suppress(queue.Empty):
            while True:
                answers.append(self._answers.get_nowait())
        return answers

    def take(self, handed_out: Mapping[str, Any]) -> None:
        """Take in what `zo_rollouts` has answered: play new rollouts, and end those of a group that is gone."""
        for task in [task for task, group in self._tasks.items() if group != handed_out["group"]]:
            task.cancel()
        for described in handed_out["rollouts"]:
            task = asyncio.create_task(self._run(described))
            self._tasks[task] = described["group"]
            task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def close(self) -> None:
        """End every rollout."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, described: Mapping[str, Any]) -> None:
        row = dict(self._rows[described["trains"]][described["example"]].columns or {})
        transcript = self._transcripts.of(described)
        async with self._places:
            rollout = self._opened.open(described, transcript)
            try:
                reward, error = await self._reward(rollout, row)
            finally:
                self._opened.close(rollout)
        if error:
            logger.warning("a rollout of %s failed: %s", rollout.model, error)
        if transcript is not None:
            await self._transcripts.keep(described, transcript, reward, error)
        self._answers.put((described["group"], described["probe"], described["sequence"], reward, error))
        self._answered()

    async def _reward(self, rollout: OpenedRollout, row: dict[str, Any]) -> tuple[float | None, str]:
        """The reward, or None and why there is none."""
        task = asyncio.ensure_future(self._play(rollout, row))
        try:
            # Not `wait_for`: it waits for the end of what it cancels, which a program may put off for ever.
            done, _ = await asyncio.wait([task], timeout=self._objective.timeout_s)
            if not done:
                return None, f"it took longer than timeout_s={self._objective.timeout_s:g}"
            return _number(task.result()), ""
        except Exception as error:  # a user's program may raise anything: it fails its rollout and nothing else
            return None, f"{type(error).__name__}: {error}"
        finally:
            task.cancel()


def _number(returned: Any) -> float:
    """The reward. Raises ValueError: a program returned something else; NaN is the engine's to refuse."""
    try:
        if not isinstance(returned, str | bytes):
            return float(returned)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"play returned {returned!r:.80}: expected a number")
