"""Makes the job that the engine queues from a job's directory. The job reads its examples when it has a lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from vllm_zo.checkpoint.seed_log.format import StepRecord
from vllm_zo.checkpoint.seed_log.header import SeedLogHeader
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.commands import StartJob
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.engine.job import Job
from vllm_zo.engine.recorder import JobRecorder
from vllm_zo.engine.rewarder import Read, Rewarder
from vllm_zo.engine.training_rows import GrowingRows
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.methods.plan import ModuleShape
from vllm_zo.objectives import GeneratingObjective
from vllm_zo.objectives.base import steps_per_generation
from vllm_zo.slot_fit import resolve_bases

AnyJob = TypeVar("AnyJob", bound=Job)

MAX_EVAL_BATCH = 128
"""Most examples in an evaluation group: keeps the loss table and the members of one step few."""
MAX_EVAL_SEQUENCES = 4096
"""Most sequences in an evaluation group, for a reward that takes many samples of an example."""
ONE_WORKER = "is measured by one worker of one engine"


@dataclass(frozen=True)
class EngineFacts:
    """What a job must know of the engine that it runs on, or of the engines, which are all alike.

    Attributes:
        dtype: of the base weights ("bfloat16").
        quantization: vLLM's name of the base's quantisation; None: the base is not quantised.
        max_sequences: sequences that an engine runs at once.
        stages: pipeline stages. Only the last one has losses, so with several a step is decided by the host.
        workers: processes that hold the model, in all stages.
    """

    zo: ZOTrainingConfig
    dtype: str
    quantization: str | None
    max_sequences: int
    stages: int = 1
    workers: int = 1

    @classmethod
    def of(cls, zo: ZOTrainingConfig, model: Any, max_sequences: int, stages: int = 1, workers: int = 1) -> EngineFacts:
        """model: vLLM's `ModelConfig`."""
        return cls(zo, str(model.dtype).removeprefix("torch."), model.quantization, max_sequences, stages, workers)


def load_job(
    directory: JobDir,
    engine: EngineFacts,
    read: Read | None,
    *,
    kind: Callable[..., AnyJob] = Job,  # type: ignore[assignment]  # mypy: a default of a generic parameter
    recorder: Callable[..., JobRecorder] = JobRecorder,
    upto: int | None = None,
    shards: int | None = None,
) -> AnyJob:
    """The job in `directory`; it continues if its seed log has steps.

    Args:
        read: turns a completion into text. None: members do not write in this process.
        kind, recorder: the classes to make.
        upto: take the first `upto` steps of the log only; None: all of them.
        shards: into how many parts to cut a step where the job does not say.

    Raises:
        ConfigError: the method cannot run in the update space or does not fit the slots, a `fold` job has a quantised
            base or an engine with pipeline stages, V would be measured in more than one worker, the state to evaluate
            is not on disk, or the reward cannot be loaded.
        CorruptLogError: the header of the seed log cannot be read.
    """
    description = directory.read_description()
    config, evaluate_only = description.config, description.evaluate_only
    space = config.space
    if space == "fold" and engine.quantization:
        raise ConfigError(
            "update_space='fold' writes the base weights, and the base is quantised "
            f"({engine.quantization}): train with update_space='bank', which never writes them."
        )
    if space == "fold" and engine.stages > 1:
        raise ConfigError(
            f"update_space='fold' with pipeline_parallel_size={engine.stages}: every stage would have to write its "
            "part of the base; train with update_space='bank', or with tensor_parallel_size in place of stages."
        )
    # `read` is None where a coordinator of several engines makes the job.
    if config.method.coordinates.measured and (read is None or engine.workers > 1):
        raise ConfigError(f"{config.method.name}.{config.method.coordinates.measured} {ONE_WORKER}; use 'normal'.")
    if steps_per_generation(config.objective) is not None and read is None:
        raise ConfigError(
            f"objective={config.objective.name!r}: with steps_per_generation one engine writes and scores; train on "
            "one engine, or leave it out."
        )
    if shards is None and engine.stages > 1:
        shards = 1
    num_bases = resolve_bases(config.method, space, config.steps, engine.zo.slot_rank, config.bases)
    logged = read_seed_log(directory.log).records if directory.log.exists() else None
    records: Sequence[StepRecord] = (logged or ())[:upto]

    def make_header(modules: Sequence[ModuleShape]) -> SeedLogHeader:
        return SeedLogHeader.of(
            config.method,
            job_seed=config.seed,
            update_space=space,
            num_bases=num_bases,
            modules=modules,
            dtype=engine.dtype,
            base_model=description.model,
            job_config=config.to_json(),
        )

    # A version beyond the log is of steps that a crash has taken: the job takes them again, and publishes again.
    versions = [step for step in directory.published() if step <= len(records)] if logged is not None else []
    initial = description.initial
    if initial is not None and not initial.exists():
        raise ConfigError(
            f"{initial}: there is no file of this state (perhaps the disk was full); save the run and load it."
        )
    snapshot = initial or directory.snapshot
    start = StartJob(
        job_id=directory.job_id,
        seed=config.seed,
        method=config.method,
        objective=config.objective,
        update_space=space,
        num_bases=num_bases,
        target_modules=config.target_modules,
        target_layers=config.target_layers,
        max_coefficient=config.max_coefficient,
        trains=not evaluate_only,
        seed_log=None if logged is None else str(directory.log),
        upto=upto,
        # A `fold` job replays its log from the start: its folds must be made again in the base weights.
        snapshot=str(snapshot) if space == "bank" and snapshot.exists() else None,
        versions={step: str(directory.version(step)) for step in versions},
    )
    objective = config.objective
    samples: int = getattr(objective, "samples", 1)  # of each example, where members write
    return kind(
        directory,
        # Not before: the log's header has what the job itself says.
        config if config.shards is not None else replace(config, shards=shards),
        num_bases,
        start,
        eval_batch=max(1, min(MAX_EVAL_BATCH, engine.max_sequences, MAX_EVAL_SEQUENCES // samples)),
        recorder=recorder(directory, None if evaluate_only else make_header, resume=logged is not None),
        rewarder=Rewarder(objective, read) if read and isinstance(objective, GeneratingObjective) else None,
        # A job that only evaluates has taken all its steps: the evaluation at the end is left.
        first_step=config.steps if evaluate_only else len(records),
        evaluate_only=evaluate_only,
        logged=[record.coefficients for record in records],
        rows=GrowingRows(directory, config, records) if config.continual and not evaluate_only else None,
    )
