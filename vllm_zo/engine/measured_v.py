"""A pass of the base over the training rows, for a method whose V is made of what enters the modules.

The workers see these inputs, and make V of them (methods/leading.py); the scores that come back say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_zo.commands import Command, MeasureV
from vllm_zo.engine.base_pass import BasePass
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives.base import EncodedExample


class MeasuredV(BasePass):
    """Has the base score the examples that the steps read, and then the workers make V.

    Args:
        examples: number -> example.
        piece: examples in a group.
    """

    purpose = "V"

    def __init__(self, directory: JobDir, examples: Mapping[int, EncodedExample], piece: int) -> None:
        super().__init__(examples, piece)
        self._directory = directory

    def commands(self) -> list[Command]:
        return [MeasureV(self._directory.job_id, str(self._directory.start))]
