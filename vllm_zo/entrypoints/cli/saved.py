"""`vllm-zo export` and `vllm-zo replay`: they work on a job's directory and need no engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from vllm_zo.checkpoint.export import export_merged, export_peft
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import SeedLog, read_seed_log
from vllm_zo.checkpoint.snapshot import load_snapshot, snapshot_step
from vllm_zo.errors import ConfigError, JobError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.records import given_back, is_evaluation


def export_job(
    job: Path,
    out: Path,
    merged: bool = False,
    rank: int | None = None,
    upto: int | None = None,
    model: str | None = None,
) -> str:
    """Write what a job trained, by default the state that it gave back.

    Returns:
        Lines that say what it wrote.

    Raises:
        ConfigError: there is no such job, it has no adapter (`fold` without `merged`), or options contradict.
        CorruptLogError: the seed log is damaged at its head.
        JobError: `out` cannot be written.
    """
    log = _log_of(job, model)
    steps = given_back_by(JobDir(job), log) if upto is None else upto
    notes = [log.note] if log.note else []  # a damaged log may not reach the state that the job gave back
    base = log.header.base_model
    if merged:
        if rank is not None:
            raise ConfigError(f"--rank {rank} with --merged: a merged model has no rank; drop one of the two.")
        export_merged(base, log, out, upto=steps)
        return "\n".join([f"merged model of {steps} steps: {out}", *notes])
    if log.header.update_space == "fold":
        raise ConfigError(f"{job}: update_space='fold' writes the base weights, so there is no adapter; use --merged.")
    report = export_peft(rebuild_state(log, steps, snapshot=JobDir(job).version(steps)), base, out, rank=rank)
    lost = f", {report.discarded_energy:.2%} of the update's energy discarded" if rank is not None else ""
    return "\n".join([f"adapter of rank {report.rank}, {steps} steps{lost}: {out}", *report.warnings, *notes])


def _log_of(path: Path, model: str | None) -> SeedLog:
    """The seed log of a job's directory, or the log at `path` itself. `model` replaces the place of the base model."""
    log = read_seed_log(JobDir(path).log if path.is_dir() else path)
    return log if model is None else replace(log, header=replace(log.header, base_model=model))


def given_back_by(job: JobDir, log: SeedLog) -> int:
    """Step of the state that the run gave back, or would have given back if it was killed before its end."""
    # From the log's header: it is `JobConfig.keeps_best` without building the objective, whose package may be missing.
    keeps_best = log.header.update_space == "bank" and log.header.job_config.get("keep_best", True)
    evaluations = [record for record in job.read_metrics() if is_evaluation(record)]
    return given_back(evaluations, log.num_steps, keeps_best=keeps_best)


def replay_job(
    path: Path, upto: int | None = None, output: Path | None = None, model: str | None = None
) -> Iterator[str]:
    """Rebuild a run from its seed log alone; yields a line after each part of the work.

    It uses the job's own accumulators only to compare: the rebuilt ones must equal them in every bit.

    Raises:
        ConfigError: there is no log, `upto` is beyond it, or the base model is not the one that was trained.
        CorruptLogError: the seed log is damaged at its head.
        JobError: the rebuilt state differs from the job's, or `output` cannot be written.
    """
    log = _log_of(path, model)
    header = log.header
    steps = log.num_steps if upto is None else upto
    how = f"{header.build_method()}, update_space={header.update_space}, seed {header.job_seed}"
    yield f"{log.path}: {log.num_steps} steps of {how}"
    if log.note:
        yield log.note
    # Before any work: with another model of the same shapes everything below would succeed, and be wrong.
    fingerprint = header.check_base(header.base_model, fix="give its place with --model")
    yield f"base model {header.base_model} (fingerprint {fingerprint}) is the one that was trained"
    stored = _newest_stored(JobDir(log.path.parent), steps) if header.update_space == "bank" else None
    if stored is not None:
        yield _compare(log, *stored)
    if output is None:
        start = time.monotonic()
        state = rebuild_state(log, steps)
        # In double: a float32 sum over millions of squares loses the digits that two people want to compare.
        seconds, norm = time.monotonic() - start, float(state.acc_BN.double().norm())
        yield f"rebuilt the state after {steps} steps in {seconds:.1f} s, norm of the accumulators {norm:.6g}"
    elif header.update_space == "fold":
        export_merged(header.base_model, log, output, upto=steps)
        yield f"folded {steps} steps into the base again: {output}"
    else:
        report = export_peft(rebuild_state(log, steps), header.base_model, output)
        yield f"rebuilt the adapter after {steps} steps, rank {report.rank}: {output}"


def _newest_stored(job: JobDir, steps: int) -> tuple[Path, int] | None:
    """The newest accumulators that a `bank` job wrote at or before `steps`, and their step: its snapshot or a published
    version. None: it has written none."""
    written = [job.snapshot, *(job.version(step) for step in job.published())]
    found = [(path, step) for path in written if (step := snapshot_step(path)) is not None]
    return max((entry for entry in found if entry[1] <= steps), key=lambda entry: entry[1], default=None)


def _compare(log: SeedLog, path: Path, step: int) -> str:
    rebuilt, written = rebuild_state(log, step), log.header.new_state()
    load_snapshot(path, written)
    if torch.equal(rebuilt.acc_BN, written.acc_BN):
        return f"step {step}: equals {path.name}, which the job wrote, bit for bit"
    difference = float((rebuilt.acc_BN - written.acc_BN).abs().max())
    raise JobError(
        f"step {step}: differs from {path}, which the job wrote, by up to {difference:g}. A run on another kind of "
        "device differs by float rounding; anything larger means that the log or the file is not this job's."
    )
