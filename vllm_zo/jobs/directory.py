"""A job on disk: the front end writes it, the engine reads it. Only its path crosses the process boundary.

`JobDir` is the only place that knows the names of a job's files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.checkpoint.snapshot import START
from vllm_zo.config import JobConfig
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.records import Metrics
from vllm_zo.objectives import OBJECTIVES
from vllm_zo.objectives.base import EncodedExample, Objective
from vllm_zo.registry import describe

_VERSION = re.compile(r"step-(\d+)\.safetensors")


@dataclass(frozen=True)
class JobDescription:
    """The content of `job.json`.

    Attributes:
        model: name or path of the base model.
        evaluate_only: the job scores its validation data once and trains nothing.
        initial: the snapshot whose state it scores; None: the base model.
        asked: the objective before the kind of data (chats or prompts) has decided how it reads; None: as in `config`.
    """

    model: str
    config: JobConfig
    evaluate_only: bool = False
    initial: Path | None = None
    asked: Objective | None = None

    @property
    def asked_objective(self) -> Objective:
        return self.asked or self.config.objective


@dataclass(frozen=True)
class JobDir:
    """The files of one job. The directory's name is the job's id."""

    path: Path

    @property
    def job_id(self) -> str:
        return self.path.name

    @property
    def description(self) -> Path:
        """The job's configuration, and the name of its model."""
        return self.path / "job.json"

    @property
    def recipe(self) -> Path:
        """What `vllm-zo train` was told, as a recipe that repeats the run."""
        return self.path / "recipe.yaml"

    @property
    def train(self) -> Path:
        """Tokenised training examples, one a line."""
        return self.path / "train.jsonl"

    @property
    def validation(self) -> Path:
        """Tokenised validation examples, one a line."""
        return self.path / "validation.jsonl"

    @property
    def reference(self) -> Path:
        """What the base says of the examples, where the objective asks (`engine/references.py`)."""
        return self.path / "reference.json"

    @property
    def generation(self) -> Path:
        """What the job's state has written for its steps to score (`engine/generations.py`)."""
        return self.path / "generation.json"

    @property
    def start(self) -> Path:
        """The state before the first step, of a job that measures its V for it (`engine/measured_v.py`)."""
        return self.path / START

    @property
    def appended(self) -> Path:
        """Rows that were appended to a continual job (`jobs/appended.py`)."""
        return self.path / "appended.jsonl"

    @property
    def log(self) -> Path:
        """The seed log. It alone rebuilds the state."""
        return self.path / "seeds.log"

    @property
    def metrics(self) -> Path:
        """One record (`jobs/records.py`) a line."""
        return self.path / "metrics.jsonl"

    @property
    def transcripts(self) -> Path:
        """What a few rollouts of the first evaluation and of the newest one have said."""
        return self.path / "transcripts.json"

    @property
    def snapshot(self) -> Path:
        """The newest fp32 accumulators, for resuming at once."""
        return self.path / "snapshot.safetensors"

    @property
    def summary(self) -> Path:
        """The job's summary from when the engine last closed it."""
        return self.path / "summary.json"

    @property
    def cluster(self) -> Path:
        """What a coordinator that is started again has to know of the run, beside the log."""
        return self.path / "cluster.json"

    def version(self, step: int) -> Path:
        """The fp32 accumulators of one published version."""
        return self.path / f"step-{step}.safetensors"

    def published(self) -> list[int]:
        """Steps whose version is on disk, in order."""
        found = (_VERSION.fullmatch(path.name) for path in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    # --- description and examples -----------------------------------------------------------------------------------

    def write(
        self, description: JobDescription, train: Sequence[EncodedExample], validation: Sequence[EncodedExample]
    ) -> None:
        """Write what the engine needs to start the job. Raises JobError: the disk refuses."""
        write_atomically(self.train, _encode_examples(train))
        write_atomically(self.validation, _encode_examples(validation))
        fields = {
            "model": description.model,
            "config": description.config.to_json(),
            "evaluate_only": description.evaluate_only,
            "initial": None if description.initial is None else str(description.initial),
            "asked": describe(description.asked_objective),
        }
        write_atomically(self.description, json.dumps(fields, indent=1).encode())  # last: with it the job is whole

    def read_description(self) -> JobDescription:
        fields = json.loads(self.description.read_text(encoding="utf-8"))
        initial = fields["initial"]
        return JobDescription(
            fields["model"],
            JobConfig.from_json(fields["config"]),
            fields["evaluate_only"],
            None if initial is None else Path(initial),
            OBJECTIVES.build(fields["asked"]) if "asked" in fields else None,  # an older version wrote none
        )

    def read_train(self) -> list[EncodedExample]:
        return _read_examples(self.train)

    def read_validation(self) -> list[EncodedExample]:
        return _read_examples(self.validation)

    def read_metrics(self) -> list[Metrics]:
        """Every whole record. It skips half a line at the end, which a process that was killed may have left."""
        lines = self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def read_transcripts(self) -> dict[str, Any]:
        """The transcripts of rollouts (`entrypoints/llm/rollouts/transcripts.py`); empty if there are none."""
        if not self.transcripts.exists():
            return {}
        found: dict[str, Any] = json.loads(self.transcripts.read_text(encoding="utf-8"))
        return found

    def read_summary(self) -> dict[str, Any] | None:
        """The job's summary; None if the engine was killed before it could write one."""
        if not self.summary.exists():
            return None
        summary: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        return summary

    def check_same_data(self, train: Sequence[EncodedExample]) -> None:
        """Refuse to resume with other training data, which would silently change the job's trajectory.

        Raises:
            ConfigError: the tokenised examples differ; the message names the first row that does.
        """
        started_with = self.read_train()
        pairs = zip(started_with, train, strict=False)
        row = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(started_with), len(train)))
        if row < max(len(started_with), len(train)):
            raise ConfigError(
                f"train: row {row + 1} is not what the run in {self.path} was started with ({len(started_with)} rows "
                f"then, {len(train)} now). Resume with the same data, in the same order, or start a new job."
            )


def _encode_examples(examples: Sequence[EncodedExample]) -> bytes:
    return b"".join(msgspec.json.encode(example) + b"\n" for example in examples)


def _read_examples(path: Path) -> list[EncodedExample]:
    decoder = msgspec.json.Decoder(EncodedExample)
    with path.open("rb") as file:
        return [decoder.decode(line) for line in file]
