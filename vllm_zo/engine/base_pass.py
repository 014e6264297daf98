"""Groups of the base before a job's first step: a pass over its examples for something that the steps need.

The base scores them, or it writes a completion of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence

from vllm_zo.commands import Command
from vllm_zo.engine.group import Work
from vllm_zo.methods.plan import Probe, ProbePlan
from vllm_zo.objectives.base import EncodedExample

PIECE = 16
"""Most examples of a group: all of its scores go to the host."""


class BasePass(ABC):
    """Hands out the examples that the base has yet to read, in pieces.

    Args:
        examples: number -> example, in the order in which they are read.
        piece: examples in a group.
    """

    purpose: str
    """What it is for, in the words of the log."""

    def __init__(self, examples: Mapping[int, EncodedExample], piece: int) -> None:
        self._to_score = examples
        numbers, piece = list(examples), min(piece, PIECE)
        self.missing = len(numbers)
        """Examples whose groups have not answered."""
        self._pieces = deque(tuple(numbers[i : i + piece]) for i in range(0, len(numbers), piece))

    def next_work(self, step: int) -> Work | None:
        """The next examples that the base reads; None: all are issued."""
        if not self._pieces:
            return None
        ids = self._pieces.popleft()
        plan = ProbePlan(step=step, probes=(Probe(key=0, sign=0, eps=0.0, of_base=True),), basis=0)
        return Work(plan, ids, tuple(self._to_score[i] for i in ids), None)

    def put_back(self, piece: tuple[int, ...]) -> None:
        """Take back a piece whose group was dropped; it comes next."""
        self._pieces.appendleft(piece)

    def add(self, work: Work, cells: Sequence[Sequence[float]]) -> None:
        """Take in the (1, cells) scores of a piece."""
        self.missing -= len(work.example_ids)

    def then(self) -> BasePass | None:
        """The pass that follows once nothing is missing; None: the job goes on."""
        return None

    @abstractmethod
    def commands(self) -> list[Command]:
        """What the workers do once nothing is missing."""
