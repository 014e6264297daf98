"""A job on disk: the front end writes it, the engine reads it. Only the path crosses the process boundary.

job.json             the configuration and which model it is for
train.jsonl          tokenised training examples, one a line
validation.jsonl     tokenised validation examples
seeds.log            the seed log (alone rebuilds the state)
metrics.jsonl        one record a step and an evaluation
snapshot.safetensors fp32 accumulators, for resuming at once
step-<n>.safetensors the same, one a published version
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.checkpoint.header import SeedLogHeader
from vllm_zo.checkpoint.records import StepRecord
from vllm_zo.checkpoint.seed_log import read_seed_log
from vllm_zo.commands import StartJob
from vllm_zo.config import JobConfig, ZOTrainingConfig
from vllm_zo.engine.job import Job
from vllm_zo.engine.recorder import JobRecorder
from vllm_zo.errors import ConfigError
from vllm_zo.methods.base import ModuleShape
from vllm_zo.methods.spaces import resolve_bases
from vllm_zo.objectives.base import EncodedExample

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MAX_EVAL_BATCH = 128
"""Examples per evaluation group; keeps the loss table and one step's members small."""


def write_job(
    directory: Path,
    config: JobConfig,
    train: Sequence[EncodedExample],
    validation: Sequence[EncodedExample],
    model: str,
    *,
    evaluate_only: bool = False,
    initial: Path | None = None,
) -> None:
    """Write a job for `load_job`. With `evaluate_only` it scores the validation data once, in the state of the snapshot
    `initial` (None: the base model)."""
    write_atomically(directory / "train.jsonl", _encode_examples(train))
    write_atomically(directory / "validation.jsonl", _encode_examples(validation))
    description = {
        "model": model,
        "config": config.to_json(),
        "evaluate_only": evaluate_only,
        "initial": None if initial is None else str(initial),
    }
    write_atomically(directory / "job.json", json.dumps(description, indent=1).encode())


def check_same_data(directory: Path, train: Sequence[EncodedExample]) -> None:
    """Refuse to resume the job in `directory` with other training data, which would silently change its trajectory.

    Raises:
        ConfigError: the tokenised examples differ; names the first row that does.
    """
    started_with = _read_examples(directory / "train.jsonl")
    pairs = zip(started_with, train, strict=False)
    row = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(started_with), len(train)))
    if row < max(len(started_with), len(train)):
        raise ConfigError(
            f"train: row {row} is not what the run in {directory} was started with ({len(started_with)} rows then, "
            f"{len(train)} now). Resume with the same data, in the same order, or start a new job."
        )


def _encode_examples(examples: Sequence[EncodedExample]) -> bytes:
    return b"".join(msgspec.json.encode(example) + b"\n" for example in examples)


def _read_examples(path: Path) -> list[EncodedExample]:
    decoder = msgspec.json.Decoder(EncodedExample)
    with path.open("rb") as file:
        return [decoder.decode(line) for line in file]


def read_description(directory: Path) -> dict[str, Any]:
    """What `job.json` says."""
    description: dict[str, Any] = json.loads((directory / "job.json").read_text(encoding="utf-8"))
    return description


def load_job(
    directory: Path, zo: ZOTrainingConfig, vllm_config: VllmConfig, max_sequences: int
) -> tuple[Job, JobRecorder, StartJob]:
    """Everything the controller needs to run the job in `directory`; continues it when its seed log has steps.

    Raises:
        ConfigError: the method cannot run in the update space, does not fit the slots, the base is quantised and the
            space is `fold`, or the state to evaluate is not on disk.
    """
    description = read_description(directory)
    config, model = JobConfig.from_json(description["config"]), description["model"]
    evaluate_only: bool = description["evaluate_only"]
    space = config.space
    if space == "fold" and vllm_config.model_config.quantization:
        raise ConfigError(
            f"update_space='fold' writes the base weights, and the base is quantised "
            f"({vllm_config.model_config.quantization}): "
            "train with update_space='bank', which never writes them."
        )
    num_bases = resolve_bases(config.method, space, config.steps, zo.slot_rank, config.bases)
    job_id = directory.name
    records, log_path = _resume_point(directory)
    job = Job(
        job_id,
        directory,
        config,
        num_bases,
        _read_examples(directory / "train.jsonl"),
        _read_examples(directory / "validation.jsonl"),
        eval_batch=min(MAX_EVAL_BATCH, max_sequences),
        first_step=config.steps if evaluate_only else len(records),
        evaluate_only=evaluate_only,
        logged=[record.coefficients for record in records],
    )

    def make_header(modules: Sequence[ModuleShape]) -> SeedLogHeader:
        return SeedLogHeader.of(
            config.method,
            job_seed=config.seed,
            update_space=space,
            num_bases=num_bases,
            modules=modules,
            dtype=vllm_config.model_config.dtype,
            base_model=model,
            job_config=config.to_json(),
        )

    recorder = JobRecorder(directory, None if evaluate_only else make_header, resume=log_path is not None)
    if (initial := description["initial"]) is not None and not Path(initial).exists():
        raise ConfigError(f"{initial}: the state to evaluate is not there (was the disk full?); save and load the run.")
    snapshot = initial or str(directory / "snapshot.safetensors")
    start = StartJob(
        job_id=job_id,
        seed=config.seed,
        method=config.method,
        objective=config.objective,
        update_space=space,
        num_bases=num_bases,
        target_modules=config.target_modules,
        max_coefficient=config.max_coefficient,
        seed_log=str(log_path) if log_path else None,
        snapshot=snapshot if space == "bank" and Path(snapshot).exists() else None,
    )
    return job, recorder, start


def _resume_point(directory: Path) -> tuple[Sequence[StepRecord], Path | None]:
    path = directory / "seeds.log"
    return (read_seed_log(path).records, path) if path.exists() else ((), None)
