"""Rebuilds the state from a seed log: applies every record again, bit for bit as the worker applied it.

"Bit for bit" holds on the same kind of device. The integers of the noise agree on every device, its normals agree up to
float rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.checkpoint.seed_log.format import StepRecord
from vllm_zo.checkpoint.seed_log.reader import SeedLog
from vllm_zo.checkpoint.snapshot import START, load_snapshot, snapshot_step
from vllm_zo.errors import ConfigError
from vllm_zo.methods.fold import fold_into
from vllm_zo.methods.spaces import basis_of
from vllm_zo.methods.state import AdapterState

logger = logging.getLogger("vllm.zo")

FOLD_STREAM = "fold"

FoldHook = Callable[[int, int, Tensor], None]
"""Called as hook(key, basis, accumulator (N,)) at every fold."""


def fold_key(job_seed: int, step: int) -> int:
    """Key of the fold that comes before `step`, the first step of a new basis (or one past the last step of a run)."""
    return noise.derive_key(job_seed, FOLD_STREAM, step)


def rebuild_state(
    log: SeedLog,
    upto: int | None = None,
    snapshot: Path | str | None = None,
    device: torch.device | str = "cpu",
) -> AdapterState:
    """The state after the first `upto` steps of a log.

    In `fold` space the state holds the accumulator that is not folded yet, which belongs to the last step's basis.

    Args:
        upto: number of steps; None: all steps of the intact prefix.
        snapshot: start from this file if it can be read and is not ahead of `upto`; else from zero.

    Raises:
        ConfigError: `upto` is beyond the log, or the snapshot belongs to another job.
    """
    state = log.header.new_state(device)
    replay_into(state, log, upto, snapshot)
    return state


def replay_into(
    state: AdapterState,
    log: SeedLog,
    upto: int | None = None,
    snapshot: Path | str | None = None,
    on_fold: FoldHook | None = None,
) -> None:
    """`rebuild_state` into a fresh state of the job.

    Args:
        on_fold: called at every fold of a `fold` job, but not for the accumulator that is left at the end. The replay
            skips folds before a snapshot: start from zero to get them all.

    Raises:
        ConfigError: as `rebuild_state`.
    """
    header, method = log.header, state.method
    end = _end(log, upto)
    start = _start(state, snapshot, end)
    if not start and state.coordinates.measured:
        _load_measured(state, log, end)
    for record in log.records[start:end]:
        basis = basis_of(method, record.step, header.update_space, header.num_bases)
        if header.update_space == "fold" and state.last_basis not in (None, basis):
            taken = state.take()
            if taken is not None and on_fold is not None:
                on_fold(fold_key(header.job_seed, record.step), *taken)
        apply_record(state, record, header.update_space)


def apply_record(state: AdapterState, record: StepRecord, update_space: str) -> None:
    """Take a logged step. What the log holds of it is all that the state needs."""
    basis = basis_of(state.method, record.step, update_space, state.num_bases)
    # Without the eps schedule: an update needs the keys of the directions, not the radii of the probes.
    plan = state.method.plan(state.job_seed, record.step, basis)
    coefficients = torch.tensor(record.coefficients, dtype=torch.float32)
    state.apply(plan, coefficients, record.learning_rate, record.finite)


def replay_weights(weights: Mapping[str, Tensor], log: SeedLog, upto: int | None = None) -> dict[str, Tensor]:
    """The target weights of a `fold` job after its first `upto` steps, all folded in.

    It folds at every change of basis as the engine did, and once more for the accumulator that is left at the end. A
    run that goes on would keep that last accumulator apart until the basis changes.

    Args:
        weights: module name -> (out, in), in the dtype of the engine; they are not changed.

    Raises:
        ConfigError: the log belongs to a job of another space, `upto` is beyond it, or a weight is missing.
    """
    header = log.header
    if header.update_space != "fold":
        raise ConfigError(f"update_space={header.update_space!r}: the job did not change the base; export its adapter.")
    missing = [module.name for module in header.modules if module.name not in weights]
    if missing:
        raise ConfigError(
            f"no weight of {missing[0]!r} ({len(missing)} missing): expected all target modules of the log."
        )
    folded = dict(weights)
    state = header.new_state(next(iter(weights.values())).device)

    def fold(key: int, basis: int, acc_N: Tensor) -> None:
        for module, u_OR, v_IR in zip(header.modules, *state.factors(basis, acc_N), strict=True):
            folded[module.name] = fold_into(folded[module.name], u_OR, v_IR, key, module.name)

    end = _end(log, upto)
    # The rounding of a fold draws a word of noise for every weight, which is half a second for a hundred million.
    logger.info("%s: folding %d steps into the weights; thousands take minutes", log.path, end)
    replay_into(state, log, end, on_fold=fold)
    if (taken := state.take()) is not None:
        fold(fold_key(header.job_seed, end), *taken)
    return folded


def _end(log: SeedLog, upto: int | None) -> int:
    if upto is None:
        return log.num_steps
    if not 0 <= upto <= log.num_steps:
        raise ConfigError(f"upto={upto}: {log.path} holds {log.num_steps} intact steps. {log.note}".rstrip())
    return upto


def _load_measured(state: AdapterState, log: SeedLog, end: int) -> None:
    """Load what a job has measured before its first step, if it has.

    Raises:
        ConfigError: the file is not beside the log, which has steps.
    """
    path = log.path.with_name(START)
    if path.exists():
        load_snapshot(path, state, fix="put the job's own beside its log, which does not have it")
    elif end:
        raise ConfigError(
            f"{path}: is missing. It holds what the job measured before its first step, and the log does not; put the "
            "file beside the log."
        )


def _start(state: AdapterState, snapshot: Path | str | None, end: int) -> int:
    """Load the snapshot if it helps; returns the steps it holds, 0 without one.

    A snapshot ahead of `end` is of no use: steps cannot be taken out of it.

    Raises:
        ConfigError: the snapshot belongs to another job.
    """
    if snapshot is None or not Path(snapshot).exists():
        return 0
    step = snapshot_step(snapshot)
    if step is None or step > end:
        why = "cannot be read" if step is None else f"has {step} steps, more than the {end} to replay"
        logger.warning("snapshot %s %s: replaying the log from its start", snapshot, why)
        return 0
    return load_snapshot(snapshot, state)
