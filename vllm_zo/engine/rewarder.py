"""Computes the rewards of a group's completions in a thread, while the engine goes on serving."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm_zo.errors import RewardError, ZOError
from vllm_zo.objectives.base import EncodedExample, GeneratingObjective, ScoringSequence
from vllm_zo.objectives.cells import flatten_sequences

Cells = tuple[tuple[float, ...], ...]
"""(probes, sequences) rewards."""
Read = Callable[[ScoringSequence, Sequence[int]], str]
"""(the sequence that was continued, token ids of the completion) -> the text of the completion."""


class Rewarder:
    """Scores completions for one job, with its reward function and the engine's tokenizer.

    Raises:
        ConfigError: on creation, the reward cannot be loaded in this process.
    """

    def __init__(self, objective: GeneratingObjective, read: Read) -> None:
        self.timeout_s = objective.timeout_s
        self._score = objective.scorer()
        self._read = read

    def start(self, examples: Sequence[EncodedExample], completions: Sequence[Sequence[int]]) -> Scoring:
        """Begin to score the completions of a group.

        Args:
            completions: token ids, probe by probe, each in the order of the examples' sequences.
        """
        columns = [example.columns or {} for example in examples for _ in example.sequences]
        sequences = flatten_sequences(examples)
        return Scoring(lambda: self._rewards(sequences, columns, completions), self.timeout_s)

    def _rewards(
        self,
        continued: Sequence[ScoringSequence],
        columns: list[dict[str, Any]],
        completions: Sequence[Sequence[int]],
    ) -> Cells:
        probes, sequences = len(completions) // len(columns), len(columns)
        texts = [self._read(*one) for one in zip(list(continued) * probes, completions, strict=True)]
        rewards = self._score(texts, columns * probes)
        return tuple(tuple(rewards[probe * sequences : (probe + 1) * sequences]) for probe in range(probes))


class Scoring:
    """Computes one group's rewards in a thread. The thread is a daemon, so that one that never returns does not keep
    the process alive.

    It needs no lock: the thread assigns one attribute, once, and the engine only reads them.
    """

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
        except Exception as error:  # any: a user's reward function must not end the engine that others use
            self._error = RewardError(f"scoring the completions failed: {type(error).__name__}: {error}")

    def wait(self, seconds: float) -> None:
        """Wait for the rewards, at most `seconds`."""
        self._thread.join(seconds)

    @property
    def ready(self) -> bool:
        """Whether `outcome` has something to tell: the rewards, or why there are none."""
        return self._cells is not None or self._error is not None or time.monotonic() > self._deadline

    def outcome(self) -> Cells | None:
        """(probes, sequences) rewards; None while they are not ready.

        Raises:
            RewardError: the reward failed, or is not ready in time.
        """
        if self._error is not None:
            raise self._error
        if self._cells is None and time.monotonic() > self._deadline:
            raise RewardError(
                f"the reward did not answer within timeout_s={self._timeout_s:g}: make it faster, score fewer "
                "completions a step, or raise timeout_s"
            )
        return self._cells
