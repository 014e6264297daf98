"""`vllm-zo eval`: the base or what a job has learnt, on the test rows of ready-made tasks (vllm_zo/tasks)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_zo.checkpoint.adapter_files import refuse_adapter
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.config import JobConfig, ZOTrainingConfig
from vllm_zo.entrypoints.cli import train
from vllm_zo.entrypoints.cli.saved import given_back_by
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.methods.adapter import num_blocks
from vllm_zo.slot_fit import SLOT_RANKS
from vllm_zo.tasks import PRESETS, Task, load_task

HARNESS = "docs/recipes.md says how lm-evaluation-harness runs its tasks on the server"


@dataclass(frozen=True)
class Learnt:
    """What a job has learnt: what an evaluation needs of a run."""

    config: JobConfig
    version_file: Path


def evaluate(
    tasks: str,
    model: str | None,
    job: Path | None,
    data: Path | None,
    seed: int,
    engine: Mapping[str, Any],
    *,
    as_json: bool = False,
) -> Iterator[str]:
    """A line for each task: loss and metrics of the base, and of what the job has learnt.

    Args:
        tasks: names, with commas between them.
        model: None: that of the job.
        data: a directory that holds a folder for each task, or with one task its files. None: the hub.
        seed: chooses the test rows.
        engine: options of vLLM's LLM.

    Raises:
        ConfigError: a task is unknown, data is missing, or there is no such job.
        JobError: an evaluation failed.
    """
    names = [name for name in tasks.split(",") if name]
    if not names or not PRESETS.keys() >= {*names}:
        raise ConfigError(f"--tasks {tasks}: expected {', '.join(PRESETS)}, commas between them. {HARNESS}.")
    learnt, trained_on = (None, None) if job is None else _read(job)
    if (model := model or trained_on) is None:
        raise ConfigError("--model is missing: a directory or a Hugging Face name; or --job.")
    loaded = [load_task(name, _place(data, name, names), seed) for name in names]
    llm = train.start_engine(model, _slots(learnt), engine, quiet=True)
    for task in loaded:
        numbers = {"base": _scores(llm, task, None)} | ({"job": _scores(llm, task, learnt)} if learnt else {})
        if as_json:
            yield json.dumps({"task": task.name, "rows": len(task.test), **numbers})
        else:
            yield f"{task.name}, {len(task.test)} test rows"
            yield from (f"  {which}: {', '.join(_shown(scores))}" for which, scores in numbers.items())


def _scores(llm: Any, task: Task, learnt: Learnt | None) -> dict[str, float]:
    scores: dict[str, float] = llm.evaluate(task.test, task.final_objective, run=learnt)
    return scores


def _shown(scores: Mapping[str, float]) -> Iterator[str]:
    return (f"{name} {value:.4f}" for name, value in scores.items())


def _place(data: Path | None, name: str, names: Sequence[str]) -> Path | None:
    """The directory with a task's files."""
    return data if data is None or len(names) == 1 else data / name


def _slots(learnt: Learnt | None) -> ZOTrainingConfig:
    """Slots in which the job's state fits as it did when it was trained."""
    if learnt is None:
        return ZOTrainingConfig()
    coordinates, bases = learnt.config.method.coordinates, learnt.config.bases or 1
    needed = num_blocks(coordinates, bases) * coordinates.rank
    return ZOTrainingConfig(slot_rank=next(rank for rank in SLOT_RANKS if rank >= needed))


def _read(job: Path) -> tuple[Learnt, str]:
    """What a job has learnt, and its model.

    Raises:
        ConfigError: there is no job, or an adapter alone; it has changed the base itself, or its state is gone.
        CorruptLogError: its seed log is damaged at its head.
    """
    refuse_adapter(job, f"--job {job}")
    directory = JobDir(job)
    if not directory.description.exists() or not directory.log.exists():
        raise ConfigError(f"--job {job}: no job.json and seeds.log there; give the directory of a run (--output).")
    description, log = directory.read_description(), read_seed_log(directory.log)
    if log.header.update_space == "fold":
        raise ConfigError(f"--job {job}: a `fold` run has no adapter; give its model: --model {job / 'merged'}.")
    version = directory.version(given_back_by(directory, log))
    if not version.exists():
        raise ConfigError(f"{version}: there is no file of this state; run vllm-zo export, and evaluate that model.")
    return Learnt(replace(description.config, bases=log.header.num_bases), version), description.model
