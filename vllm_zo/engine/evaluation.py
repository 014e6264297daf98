"""The evaluations of a job: at which steps they begin, and their pieces. One group scores one piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class Evaluations:
    """Tracks which pieces of the validation data have yet to be scored, and the results of the evaluation under way.

    Args:
        num_examples: number of validation examples; 0: the job makes no evaluations.
        piece: examples in a group.
        interval: steps between evaluations; None: only before the first step and after the last.
    """

    def __init__(self, num_examples: int, piece: int, interval: int | None) -> None:
        self.num_examples, self.piece, self.interval = num_examples, piece, interval
        self._pieces: deque[tuple[int, ...]] = deque()
        """Pieces of the evaluation under way that have yet to be issued."""
        self._begun_at: int | None = None
        """Step of the newest evaluation."""
        self._results: dict[int, tuple[Sequence[float], Sequence[int]]] = {}
        """Number of a piece's first example -> losses and predictions of the piece."""

    @property
    def has_pieces(self) -> bool:
        return bool(self._pieces)

    @property
    def under_way(self) -> bool:
        return self._begun_at is not None and sum(len(p) for _, p in self._results.values()) < self.num_examples

    def is_due(self, step: int, *, at_end: bool) -> bool:
        """Whether an evaluation begins before the next training step. While one is under way, no other begins."""
        if not self.num_examples or self._begun_at == step or self.under_way:
            return False
        return at_end or step == 0 or bool(self.interval and step % self.interval == 0)

    def begin(self, step: int) -> None:
        self._begun_at, self._results = step, {}
        ids = range(self.num_examples)
        self._pieces.extend(tuple(ids[i : i + self.piece]) for i in range(0, self.num_examples, self.piece))

    def take(self) -> tuple[int, ...]:
        """The next piece, as indices into the validation data."""
        return self._pieces.popleft()

    def put_back(self, piece: tuple[int, ...]) -> None:
        """Take back a piece whose group was dropped; it comes next."""
        self._pieces.appendleft(piece)

    def add(
        self, step: int, piece: Sequence[int], losses: Sequence[float], predictions: Sequence[int]
    ) -> tuple[list[float], list[int]] | None:
        """Take in the losses (nats) and predictions of a piece, one for each of its examples.

        Returns those of all examples, in their order, once the last piece is in, and None before.
        """
        assert step == self._begun_at and self.under_way
        self._results[piece[0]] = losses, predictions
        in_order = [self._results[first] for first in sorted(self._results)]
        if sum(len(part) for _, part in in_order) < self.num_examples:
            return None
        return [x for part, _ in in_order for x in part], [x for _, part in in_order for x in part]
