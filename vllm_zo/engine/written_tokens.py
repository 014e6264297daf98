"""A pass in which the base writes completions of training rows. What it writes is measured (`measured_v.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from vllm_zo import noise
from vllm_zo.commands import Command
from vllm_zo.engine.base_pass import BasePass
from vllm_zo.engine.group import Work
from vllm_zo.engine.measured_v import Measured
from vllm_zo.jobs.directory import JobDir
from vllm_zo.methods.coordinates import Coordinates
from vllm_zo.objectives.base import EncodedExample
from vllm_zo.objectives.written import scored

MOST_ROWS = 128
"""Rows of which the base writes a completion: a thousand tokens, in which those that matter are."""
STREAM = "written"
"""Part of the seed of every completion, so that no step samples with the same numbers."""


class WrittenTokens(BasePass):
    """Has the base write one completion for each of the first examples, sampled as in training.

    Args:
        coordinates: say what is measured.
        examples: number -> example that the steps read.
        job_seed: the job's seed.
        piece: examples in a group.
    """

    purpose = "the tokens that it writes"

    def __init__(
        self,
        directory: JobDir,
        coordinates: Coordinates,
        examples: Mapping[int, EncodedExample],
        job_seed: int,
        piece: int,
    ) -> None:
        self._examples = dict(zip(examples, self.read(examples.values()), strict=False))
        super().__init__(self._examples, piece)
        self._directory, self._coordinates, self._job_seed, self._piece = directory, coordinates, job_seed, piece
        self._written: dict[int, EncodedExample] = {}
        """Number -> example with its completion."""

    @staticmethod
    def read(examples: Iterable[EncodedExample]) -> list[EncodedExample]:
        """Those of a job's examples that the pass reads, with one sequence each."""
        return [replace(example, sequences=example.sequences[:1]) for example in islice(examples, MOST_ROWS)]

    def next_work(self, step: int) -> Work | None:
        work = super().next_work(step)
        if work is None:
            return None
        seeds = tuple(noise.derive_seed(self._job_seed, STREAM, i) for i in work.example_ids)
        return replace(work, sampling_seeds=seeds)

    def wrote(self, work: Work, completions: Sequence[Sequence[int]]) -> None:
        """Keep what a group has written, ends of completions included."""
        for number, completion in zip(work.example_ids, completions, strict=True):
            self._written[number] = scored(self._examples[number], [completion], [0.0])

    def then(self) -> BasePass:
        in_order = {number: self._written[number] for number in self._examples}
        return Measured(self._directory, self._coordinates, in_order, self._piece)

    def commands(self) -> list[Command]:
        return []
