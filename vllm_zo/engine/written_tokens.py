"""A pass in which the base writes: completions of training rows, whose tokens are counted (methods/written.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from vllm_zo import noise
from vllm_zo.commands import Command, SizeU
from vllm_zo.engine.base_pass import BasePass
from vllm_zo.engine.group import Work
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives.base import EncodedExample

MOST_ROWS = 128
"""Rows of which the base writes a completion: a thousand tokens, in which those that matter are."""
STREAM = "written"
"""Part of the seed of every completion, so that no step samples with the same numbers."""


class WrittenTokens(BasePass):
    """Has the base write one completion for each of the first examples, sampled as in training.

    Args:
        examples: number -> example that the steps read.
        job_seed: the job's seed.
        piece: examples in a group.
    """

    purpose = "the tokens that it writes"

    def __init__(self, directory: JobDir, examples: Mapping[int, EncodedExample], job_seed: int, piece: int) -> None:
        super().__init__(dict(zip(examples, self.read(examples.values()), strict=False)), piece)
        self._directory, self._job_seed = directory, job_seed
        self._counts: Counter[int] = Counter()

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

    def wrote(self, completions: Sequence[Sequence[int]]) -> None:
        """Count the tokens of a group, ends of completions among them."""
        for completion in completions:
            self._counts.update(completion)

    def commands(self) -> list[Command]:
        counts = tuple(sorted(self._counts.items()))
        return [SizeU(self._directory.job_id, str(self._directory.start), counts)]
