"""What a job's own state writes for its next steps to score (`GeneratingObjective.steps_per_generation`).

Generation g is written by the state before step g * steps_per_generation, and scored by the steps from there to the
next one. Its file is there before the first of them: a job that is resumed goes on with what an unbroken one would
score.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.engine.group import Work
from vllm_zo.engine.rewarder import Cells
from vllm_zo.engine.training_rows import Drawn, TrainingRows
from vllm_zo.errors import JobError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives.written import scored

logger = logging.getLogger("vllm.zo")


class Generations:
    """The generation that the steps score.

    Args:
        steps: that score a generation.
    """

    def __init__(self, directory: JobDir, rows: TrainingRows, steps: int) -> None:
        self._directory, self._rows, self.steps = directory, rows, steps
        self._drawn: Drawn | None = None
        """What the steps of generation `_number` score."""
        self._number = -1

    def covers(self, step: int) -> bool:
        """Whether the completions that a step scores are there."""
        return self._number == step // self.steps

    def draw(self, step: int) -> Drawn:
        """The rows of a step, with what was written for them."""
        assert self._drawn is not None and self.covers(step)
        return self._drawn

    def recall(self, step: int) -> None:
        """Read what an earlier start of the job wrote for this step, if it was amid a generation."""
        number, path = step // self.steps, self._directory.generation
        if step % self.steps == 0:
            return
        kept: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {"number": None}
        if kept["number"] != number:  # the power went off before the disk had it
            logger.warning("%s lacks the completions of step %d: the model writes them again", path, step + 1)
            return
        self._number, self._drawn = number, self._scored(number, kept["completions"], kept["rewards"])

    def rows(self, step: int) -> Drawn:
        """The rows for which something is written before a step."""
        return self._rows.draw(step // self.steps)

    def wrote(self, work: Work, completions: Sequence[Sequence[int]], rewards: Cells) -> None:
        """Keep what a group has written.

        Args:
            completions: token ids, in the order of the examples' sequences.
            rewards: (1, sequences).
        """
        number = work.plan.step // self.steps
        self._number, self._drawn = number, self._scored(number, completions, rewards[0])
        kept = {"number": number, "completions": completions, "rewards": rewards[0]}
        try:
            write_atomically(self._directory.generation, json.dumps(kept).encode())
        except JobError as error:  # a full disk: a job that is resumed has the model write again
            logger.warning("the completions are not kept: %s", error)

    def _scored(self, number: int, completions: Sequence[Sequence[int]], rewards: Sequence[float]) -> Drawn:
        drawn = self._rows.draw(number)
        written = zip(completions, rewards, strict=True)
        examples = []
        for example in drawn.examples:
            texts, earned = zip(*islice(written, len(example.sequences)), strict=True)
            examples.append(scored(example, texts, earned))
        return Drawn(drawn.ids, tuple(examples))
