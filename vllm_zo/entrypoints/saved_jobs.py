"""What can be done with a job's directory when no engine runs: `vllm-zo export` and `vllm-zo replay`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_zo.checkpoint.export import export_merged, export_peft
from vllm_zo.checkpoint.hf_checkpoint import base_fingerprint
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log import SeedLog, read_seed_log
from vllm_zo.checkpoint.snapshot import load_snapshot, snapshot_info
from vllm_zo.engine.controller import version_path
from vllm_zo.errors import ConfigError, JobError

LOG_NAME = "seeds.log"
STORED = ("snapshot.safetensors", "step-*.safetensors")
"""Accumulators that a `bank` job wrote: its newest snapshot and its published versions."""


def export_job(
    job: Path,
    out: Path,
    merged: bool = False,
    rank: int | None = None,
    upto: int | None = None,
    model: str | None = None,
) -> str:
    """Write what a job trained, by default the state it gave back; returns what was written.

    Raises:
        ConfigError: no such job, or it has no adapter (`fold` without `merged`).
        JobError: `out` cannot be written.
    """
    log = _log_of(job, model)
    steps = _given_back(job, log) if upto is None else upto
    notes = [log.note] if log.note else []  # a damaged log may not reach the state that the job gave back
    base = log.header.base_model
    if merged:
        if rank is not None:
            raise ConfigError(f"--rank {rank} with --merged: a merged model has no rank; drop one of the two.")
        export_merged(base, log, out, upto=steps)
        return "\n".join([f"merged model of {steps} steps: {out}", *notes])
    if log.header.update_space == "fold":
        raise ConfigError(f"{job}: update_space='fold' writes the base weights, so there is no adapter; use --merged.")
    report = export_peft(rebuild_state(log, steps, snapshot=version_path(job, steps)), base, out, rank=rank)
    lost = f", {report.discarded_energy:.2%} of the update's energy discarded" if rank is not None else ""
    return "\n".join([f"adapter of rank {report.rank}, {steps} steps{lost}: {out}", *report.warnings, *notes])


def _log_of(path: Path, model: str | None) -> SeedLog:
    """The seed log of a job's directory, or a log itself; `model` replaces the place of the base model."""
    log = read_seed_log(path / LOG_NAME if path.is_dir() else path)
    return log if model is None else replace(log, header=replace(log.header, base_model=model))


def _given_back(job: Path, log: SeedLog) -> int:
    """Step of the state that the run gave back: the best evaluation's where it kept that, else the last."""
    try:
        summary: dict[str, Any] = json.loads((job / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:  # killed before its end
        return log.num_steps
    best = summary.get("best_step")
    keeps_best = log.header.update_space == "bank" and log.header.job_config.get("keep_best", True)
    return int(best) if keeps_best and best is not None and best <= log.num_steps else log.num_steps


def replay_job(
    path: Path, upto: int | None = None, output: Path | None = None, model: str | None = None
) -> Iterator[str]:
    """Rebuild a run from its seed log alone, telling what is done as it is done.

    What the job itself wrote is used for one thing only: the rebuilt accumulators must equal it in every bit.

    Raises:
        ConfigError: no log, `upto` beyond it, or the base model is not the one that was trained.
        JobError: the rebuilt state differs from what the job wrote.
    """
    log = _log_of(path, model)
    header = log.header
    steps = log.num_steps if upto is None else upto
    how = f"{header.build_method()}, update_space={header.update_space}, seed {header.job_seed}"
    yield f"{log.path}: {log.num_steps} steps of {how}"
    if log.note:
        yield log.note
    yield _check_base(log)
    stored = _newest_stored(log.path.parent, steps) if header.update_space == "bank" else None
    if stored is not None:
        yield _compare(log, *stored)
    if output is None:
        start = time.monotonic()
        state = rebuild_state(log, steps)
        seconds, norm = time.monotonic() - start, float(state.acc_BN.double().norm())
        yield f"rebuilt the state after {steps} steps in {seconds:.1f} s, norm of the accumulators {norm:.6g}"
    elif header.update_space == "fold":
        export_merged(header.base_model, log, output, upto=steps)
        yield f"folded {steps} steps into the base again: {output}"
    else:
        report = export_peft(rebuild_state(log, steps), header.base_model, output)
        yield f"rebuilt the adapter after {steps} steps, rank {report.rank}: {output}"


def _check_base(log: SeedLog) -> str:
    fingerprint = base_fingerprint(log.header.base_model)
    if fingerprint != log.header.base_fingerprint:
        raise ConfigError(
            f"base_model={log.header.base_model!r} (fingerprint {fingerprint}) is not the model the job trained "
            f"(fingerprint {log.header.base_fingerprint}); give its place with --model."
        )
    return f"base model {log.header.base_model} (fingerprint {fingerprint}) is the one that was trained"


def _newest_stored(directory: Path, steps: int) -> tuple[Path, int] | None:
    """The accumulators the job wrote last at or before `steps`."""
    found = [
        (path, info.step) for pattern in STORED for path in directory.glob(pattern) if (info := snapshot_info(path))
    ]
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
