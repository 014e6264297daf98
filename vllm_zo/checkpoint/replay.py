"""From a seed log back to the state: every record is applied again, bit for bit as the worker did.

Bit for bit holds on the same kind of device: integers of the noise agree everywhere, normals up to float rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.checkpoint.seed_log import SeedLog
from vllm_zo.checkpoint.snapshot import SnapshotInfo, load_snapshot, snapshot_info
from vllm_zo.errors import ConfigError
from vllm_zo.methods.fold import fold_into
from vllm_zo.methods.spaces import basis_of
from vllm_zo.methods.state import AdapterState

logger = logging.getLogger("vllm.zo")

FOLD_STREAM = "fold"

FoldHook = Callable[[int, int], None]
"""Called as hook(key, basis) with the accumulator still in the state, before it is cleared."""


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

    In `fold` space that is the accumulator not yet folded: the one of the last step's basis.

    Args:
        upto: number of steps; None: all of the intact prefix.
        snapshot: start from this file when it can be read and is not ahead of `upto`; else from zero.

    Raises:
        ConfigError: `upto` is beyond the log, or the snapshot is another job's.
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
    """`rebuild_state` into a fresh state, which may be one rank's shard of the job.

    Args:
        on_fold: in `fold` space, told of every change of basis (not of the accumulator pending at the end). Folds
            before a snapshot are not seen: replay from zero to see them all.

    Raises:
        ConfigError: as `rebuild_state`.
    """
    header, method = log.header, state.method
    end = _end(log, upto)
    start = _start(state, snapshot, end)
    basis = start.basis
    for record in log.records[start.step : end]:
        new_basis = basis_of(method, record.step, header.update_space, header.num_bases)
        if header.update_space == "fold" and record.step > 0 and new_basis != basis:
            if on_fold is not None:
                on_fold(fold_key(header.job_seed, record.step), basis)
            state.acc_BN.zero_()
        basis = new_basis
        plan = method.plan(header.job_seed, record.step, basis)
        coefficients = torch.tensor(record.coefficients, dtype=torch.float32)
        state.apply(plan, coefficients, record.learning_rate, record.finite)


def replay_weights(weights: Mapping[str, Tensor], log: SeedLog, upto: int | None = None) -> dict[str, Tensor]:
    """The target weights of a `fold` job after its first `upto` steps, all folded in.

    Folds at every change of basis as the engine did, and once more for the accumulator pending at the end. That last
    fold is part of the result only: a run that goes on keeps its accumulator apart until the basis changes.

    Args:
        weights: module name -> (out, in), in the dtype the engine ran with; not changed.

    Raises:
        ConfigError: the log is not a `fold` job's, `upto` is beyond it, or a weight is missing.
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

    def fold(key: int, basis: int) -> None:
        for module, u_OR, v_IR in zip(header.modules, *state.factors(basis, state.acc_BN[0]), strict=True):
            folded[module.name] = fold_into(folded[module.name], u_OR, v_IR, key, module.name)

    end = _end(log, upto)
    replay_into(state, log, end, on_fold=fold)
    if end:
        fold(fold_key(header.job_seed, end), basis_of(state.method, end - 1, "fold", header.num_bases))
    return folded


def _end(log: SeedLog, upto: int | None) -> int:
    if upto is None:
        return log.num_steps
    if not 0 <= upto <= log.num_steps:
        raise ConfigError(f"upto={upto}: {log.path} holds {log.num_steps} intact steps. {log.note}".rstrip())
    return upto


def _start(state: AdapterState, snapshot: Path | str | None, end: int) -> SnapshotInfo:
    """Load the snapshot if it helps. The log is the truth: a snapshot ahead of it has steps nobody can replay."""
    if snapshot is None or not Path(snapshot).exists():
        return SnapshotInfo(0, 0)
    info = snapshot_info(snapshot)
    if info is None or info.step > end:
        why = "cannot be read" if info is None else f"has {info.step} steps, more than the {end} to replay"
        logger.warning("snapshot %s %s: replaying the log from its start", snapshot, why)
        return SnapshotInfo(0, 0)
    return load_snapshot(snapshot, state)
