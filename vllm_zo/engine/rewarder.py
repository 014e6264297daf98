"""Rewards of a group's completions, computed in a thread while the engine goes on serving."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from vllm_zo.engine.group import PerturbationGroup
from vllm_zo.errors import RewardError, ZOError
from vllm_zo.objectives.reward import Reward

Cells = tuple[tuple[float, ...], ...]
"""(probes, rows) rewards."""
Decode = Callable[[Sequence[Sequence[int]]], list[str]]
"""Token ids of completions -> their texts."""


class Rewarder:
    """What a job scores with: its reward function and the engine's tokenizer.

    Raises:
        ConfigError: on creation, the reward cannot be loaded in this process.
    """

    def __init__(self, objective: Reward, decode: Decode) -> None:
        self.timeout_s = objective.timeout_s
        self._score = objective.scorer()
        self._decode = decode

    def start(self, group: PerturbationGroup) -> Scoring:
        """Begin to score a group all of whose members have finished."""
        return Scoring(lambda: self._rewards(group), self.timeout_s)

    def _rewards(self, group: PerturbationGroup) -> Cells:
        columns = [example.columns or {} for example in group.examples for _ in example.rows]
        probes, rows = len(group.plan.probes), len(columns)
        texts = self._decode([group.completions[probe, row] for probe in range(probes) for row in range(rows)])
        rewards = self._score(texts, columns * probes)
        return tuple(tuple(rewards[probe * rows : (probe + 1) * rows]) for probe in range(probes))


class Scoring:
    """One group's rewards in the making. The thread is a daemon: one that never returns is left behind."""

    def __init__(self, score: Callable[[], Cells], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._cells: Cells | None = None
        self._error: RewardError | None = None
        self._thread = threading.Thread(target=self._run, args=(score,), name="zo-reward", daemon=True)
        self._thread.start()

    def _run(self, score: Callable[[], Cells]) -> None:
        try:
            self._cells = score()
        except ZOError as error:
            self._error = RewardError(str(error))
        except Exception as error:  # the boundary between a job's own code and everybody's engine
            self._error = RewardError(f"scoring the completions failed: {type(error).__name__}: {error}")

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)

    def outcome(self) -> Cells | None:
        """The rewards; None while they are not ready.

        Raises:
            RewardError: they failed, or are not ready in time.
        """
        if self._error is not None:
            raise self._error
        if self._cells is None and time.monotonic() > self._deadline:
            raise RewardError(
                f"the reward did not answer within timeout_s={self._timeout_s:g}: make it faster, score fewer "
                "completions a step, or raise timeout_s"
            )
        return self._cells
