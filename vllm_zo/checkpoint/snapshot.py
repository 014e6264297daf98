"""A snapshot: accumulators and optimizer state in one file, so that resuming does not wait for a replay of the log."""

from __future__ import annotations

import json
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.checkpoint.header import differences
from vllm_zo.errors import ConfigError
from vllm_zo.methods import method_fields
from vllm_zo.methods.state import AdapterState

TENSOR = "acc_BN"
FORMAT = "vllm_zo snapshot 1"


@dataclass(frozen=True)
class SnapshotInfo:
    """Where a snapshot stands.

    Attributes:
        step: steps whose update is in it, which is also the next step to take.
        basis: basis of the last of them (0 before the first).
    """

    step: int
    basis: int


def save_snapshot(path: Path | str, state: AdapterState, info: SnapshotInfo) -> None:
    """Write the accumulators atomically: after a crash the file is the old snapshot or the new one.

    Under tensor parallelism every rank saves its shard to a path of its own.

    Raises:
        JobError: the file cannot be written; the snapshot before it is untouched.
    """
    metadata = {"format": FORMAT, "job": json.dumps(_identity(state)), **{k: str(v) for k, v in asdict(info).items()}}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.tensors().items()}
    write_atomically(Path(path), save(tensors, metadata=metadata))


def load_snapshot(path: Path | str, state: AdapterState) -> SnapshotInfo:
    """Read accumulators and optimizer state into a state of the same job.

    Raises:
        ConfigError: the file is missing or damaged, or of another job or shard; names what differs.
    """
    fix = "delete it: the seed log rebuilds the state without it"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ConfigError(f"snapshot {path}: not a snapshot of this version ({FORMAT!r}); {fix}.")
            differing = differences(_identity(state), json.loads(metadata["job"]))
            if differing:
                raise ConfigError(f"snapshot {path} is of another job: {'; '.join(differing)}. Use its job, or {fix}.")
            for name, tensor in state.tensors().items():
                tensor.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"snapshot {path}: cannot be read ({error}); {fix}.") from error
    info = SnapshotInfo(int(metadata["step"]), int(metadata["basis"]))
    state.optimizer_basis = info.basis if info.step else None
    return info


def snapshot_info(path: Path | str) -> SnapshotInfo | None:
    """Where the snapshot in a file stands; None when there is none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return SnapshotInfo(int(metadata["step"]), int(metadata["basis"]))
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _identity(state: AdapterState) -> dict[str, Any]:
    """What must agree for the accumulators to mean the same; JSON values."""
    layout = state.layout
    identity = {
        "job_seed": state.job_seed,
        "method": state.method.name,
        "num_bases": state.num_bases,
        "modules": [list(astuple(module)) for module in layout.modules],
        "shape": list(state.acc_BN.shape),
    }
    if layout.out_slices is not None:
        shards = zip(layout.out_slices, layout.modules, strict=True)
        identity["out_slices"] = [list(s.indices(m.out_features)[:2]) for s, m in shards]
    return identity | {f"{state.method.name}.{key}": value for key, value in method_fields(state.method).items()}
