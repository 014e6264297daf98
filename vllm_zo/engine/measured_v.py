"""What a method measures of the training rows where they are scored: V, and the sizes of U's rows.

For V the base passes over the rows. The workers see what enters the modules, and make V of it (methods/leading.py); the
scores that come back say nothing. The sizes follow from the tokens that are scored (methods/written.py), without a
pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vllm_zo.commands import Command, MeasureV, SizeU
from vllm_zo.engine.base_pass import BasePass
from vllm_zo.jobs.directory import JobDir
from vllm_zo.methods.coordinates import Coordinates
from vllm_zo.objectives.base import EncodedExample


class Measured(BasePass):
    """Has the base score the examples that the steps read, where V is measured, and then the workers use what they saw.

    Args:
        coordinates: say what is measured.
        examples: number -> example.
        piece: examples in a group.
    """

    purpose = "V"

    def __init__(
        self, directory: JobDir, coordinates: Coordinates, examples: Mapping[int, EncodedExample], piece: int
    ) -> None:
        super().__init__(examples if coordinates.measures_v else {}, piece)
        self._directory, self._coordinates = directory, coordinates
        self._counts: Counter[int] = Counter()
        if coordinates.measures_u:
            sequences = (sequence for example in examples.values() for sequence in example.sequences)
            self._counts.update(token for sequence in sequences for token in sequence.label_ids)

    def commands(self) -> list[Command]:
        # The last one writes the file, which has both: a crash between two would leave half of it for a job to resume.
        job_id, path = self._directory.job_id, str(self._directory.start)
        counts = tuple(sorted(self._counts.items()))
        if not self._coordinates.measures_v:
            return [SizeU(job_id, path, counts)]
        sizes = [SizeU(job_id, None, counts)] if counts else []
        return [*sizes, MeasureV(job_id, path)]
