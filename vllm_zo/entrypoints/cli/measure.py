"""`vllm-zo check --measure`: how long a run would take, from two steps of it on an engine that starts for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from vllm_zo.config import JobConfig
from vllm_zo.entrypoints.cli import train
from vllm_zo.entrypoints.cli.train import Plan
from vllm_zo.entrypoints.cli.work import Work
from vllm_zo.errors import ConfigError

WARM, MEASURED = 1, 2
"""Steps: the first one compiles, and fills caches."""
RATE = 1e-9
"""Learning rate of the measured steps. "auto" would take ten steps to find one."""


def measure(plan: Plan, work: Work) -> Iterator[str]:
    """Start the engine, take the steps, and say what follows from them for the whole run.

    Args:
        work: of the run.

    Raises:
        ConfigError: the engine, or a job on it, refuses the plan.
        JobError: the steps failed.
    """
    if work.steps is None:
        raise ConfigError("--measure: a continual job has no end, and so takes no time that could be told.")
    step_s = mean(_step_seconds(plan))
    token_s = step_s / work.step_tokens
    other = work.evaluations * work.evaluation_tokens + work.reference_tokens
    total_s = work.steps * step_s + other * token_s
    evaluations = f" and {work.evaluations} evaluations" if work.evaluations else ""
    yield f"time: {_duration(step_s)} a step ({MEASURED} steps measured), {1 / token_s:.3g} tokens a second"
    yield (
        f"  {work.steps} steps{evaluations} take about {_duration(total_s)} on this machine, if nothing else runs on "
        "it; evaluations are counted by their tokens"
    )


def _step_seconds(plan: Plan) -> list[float]:
    with TemporaryDirectory(prefix="vllm-zo-check-") as directory, train.engines_of(plan) as llm:
        config = _short(plan.config, Path(directory) / "job")
        run = llm.finetune(plan.train, config=config, chat=plan.chat, progress=False)
        times = [record["seconds"] for record in run.history]
    return [later - earlier for earlier, later in pairwise(times)][WARM - 1 :]


def _short(config: JobConfig, output_dir: Path) -> JobConfig:
    """The job with a few steps and nothing else."""
    return replace(
        config,
        steps=WARM + MEASURED,
        learning_rate=RATE,
        warmup_steps=0,
        eval_interval=None,
        publish_interval=None,
        patience=None,
        max_seconds=None,
        output_dir=str(output_dir),
    )


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
