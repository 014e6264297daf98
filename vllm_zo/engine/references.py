"""What the base says of a job's examples, for an objective that compares the model with it (`ReferencedObjective`).

It does not change during the job. So it is measured once an example, before the first step, and kept in the job's
directory: a resumed job compares with the same numbers. That is one forward pass for every example that the steps read;
a probe of the base in every step would be one for every example of every step, half as many again as the two probes
that learn from it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import msgspec
import torch

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.commands import Command
from vllm_zo.engine.base_pass import BasePass
from vllm_zo.engine.group import Work
from vllm_zo.errors import ConfigError, JobError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives.base import EncodedExample, ReferencedObjective

logger = logging.getLogger("vllm.zo")

Examples = Sequence[EncodedExample]


class References(BasePass):
    """Tracks which examples have yet to be scored by the base, and what it said of the others.

    Args:
        used: numbers of the training examples that the steps read.
        piece: examples in a group.
    """

    purpose = "what the steps compare with"

    def __init__(
        self,
        objective: ReferencedObjective,
        directory: JobDir,
        train: Examples,
        used: Sequence[int],
        validation: Examples,
        piece: int,
    ) -> None:
        self._objective, self._path = objective, directory.reference
        self._train, self._validation, self._used = train, validation, used
        self._examples = self.numbered(train, validation)
        """By number, as `Work.example_ids` has them."""
        # By content: validation data may change when a job is resumed, and rows may be there twice.
        self._keys = {i: _key(self._examples[i]) for i in (*used, *range(len(train), len(self._examples)))}
        self._known: dict[str, tuple[float, ...]] = {}
        if self._path.exists():
            self._known = {key: tuple(said) for key, said in json.loads(self._path.read_bytes()).items()}
        first_with = {key: number for number, key in reversed(self._keys.items()) if key not in self._known}
        super().__init__({number: self._examples[number] for number in sorted(first_with.values())}, piece)

    @staticmethod
    def numbered(train: Examples, validation: Examples) -> list[EncodedExample]:
        """The examples by their numbers in groups of the base: those of training, then those of validation."""
        return [*train, *validation]

    def add(self, work: Work, cells: Sequence[Sequence[float]]) -> None:
        """Keep what the base said of a piece. The last piece is followed by the file."""
        said = self._objective.reference(torch.tensor(cells, dtype=torch.float32), work.examples)
        self._known |= {self._keys[i]: of_one for i, of_one in zip(work.example_ids, said, strict=True)}
        super().add(work, cells)
        if not self.missing:
            self._write()

    def commands(self) -> list[Command]:
        return []

    def _write(self) -> None:
        try:
            write_atomically(self._path, json.dumps(self._known).encode())
        except JobError as error:  # a full disk: a job that is resumed asks the base again
            logger.warning("the base's scores are not kept: %s", error)

    def attached(self) -> tuple[list[EncodedExample], list[EncodedExample]]:
        """The examples of training and of validation with what the base said of them."""
        assert not self.missing
        read = {i: replace(self._examples[i], reference=self._known[key]) for i, key in self._keys.items()}
        first = len(self._train)
        return [read.get(i, example) for i, example in enumerate(self._train)], [
            read[first + i] for i in range(len(self._validation))
        ]

    def check_base(self, *, folded: bool) -> None:
        """Refuse to ask a base that is not the one that the job started from.

        Args:
            folded: the base holds what the job has learnt.

        Raises:
            ConfigError: some examples have no reference.
        """
        if folded and self.missing:
            raise ConfigError(
                f"{self._path}: lacks what the base said of {self.missing} examples, and a resumed `fold` job has "
                "changed the base; resume with the validation data of the start, or start a new job."
            )


def _key(example: EncodedExample) -> str:
    return blake2b(msgspec.json.encode(example), digest_size=12).hexdigest()
