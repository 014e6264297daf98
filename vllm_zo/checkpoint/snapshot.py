"""A snapshot: accumulators and optimizer state in one file, so that resuming does not wait for a replay of the log."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.checkpoint.seed_log.header import differences
from vllm_zo.errors import ConfigError
from vllm_zo.methods.state import AdapterState
from vllm_zo.registry import settings

FORMAT = "vllm_zo snapshot 2"
START = "start.safetensors"
"""Name of the snapshot before the first step, beside the log of a job that has measured its V: no log has that V."""
METADATA_KEY = "vllm_zo"
"""The only key of a file's metadata; its value is a JSON object with sorted keys. Equal runs must write equal bytes,
but safetensors writes several keys in an order that changes from process to process."""
REBUILDS = "delete it: the seed log rebuilds the state without it"
UNREADABLE = (SafetensorError, OSError, RuntimeError)
"""What safetensors raises. The last one: a file that is removed between its two looks at it."""


def save_snapshot(path: Path | str, state: AdapterState, step: int) -> None:
    """Write accumulators and optimizer state atomically: after a crash the file is the old snapshot or the new one.

    Equal states give equal bytes. Metadata beside the fields that identify the job:

        step         number of steps whose update is in the state, which is also the next step to take
        last_basis   basis of the last of these steps; null before the first
        bases        bases whose accumulators hold an update

    Raises:
        JobError: the file cannot be written; the snapshot before it stays as it was.
    """
    metadata = {
        "format": FORMAT,
        "job": _identity(state),
        "step": step,
        "last_basis": state.last_basis,
        "bases": state.touched_bases(),
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.tensors().items()}
    write_atomically(Path(path), save(tensors, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)}))


def load_snapshot(path: Path | str, state: AdapterState, fix: str = REBUILDS) -> int:
    """Read accumulators and optimizer state into a fresh state of the same job; returns how many steps they hold.

    Args:
        fix: what the user can do where the file is of no use, as the end of a message.

    Raises:
        ConfigError: the file is missing, damaged, or belongs to another job; the message names what differs.
    """
    try:
        # Not "pt": each tensor would lose two objects (safetensors 0.8).
        with safe_open(path, framework="np") as file:
            metadata = _metadata_of(file)
            if metadata.get("format") != FORMAT:
                raise ConfigError(f"snapshot {path}: not a snapshot of this version ({FORMAT!r}); {fix}.")
            differing = differences(_identity(state), metadata["job"])
            if differing:
                raise ConfigError(f"snapshot {path} is of another job: {'; '.join(differing)}. Use its job, or {fix}.")
            for name, tensor in state.tensors().items():
                tensor.copy_(torch.from_numpy(file.get_tensor(name)))
    except UNREADABLE as error:
        raise ConfigError(f"snapshot {path}: cannot be read ({error}); {fix}.") from error
    state.last_basis = metadata["last_basis"]
    state.mark_touched(metadata["bases"])
    return int(metadata["step"])


def snapshot_step(path: Path | str) -> int | None:
    """How many steps the snapshot in a file holds; None if the file holds no snapshot that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return int(_metadata_of(file)["step"])
    except (*UNREADABLE, KeyError, ValueError):
        return None


def _metadata_of(file: Any) -> dict[str, Any]:
    """The metadata that `save_snapshot` wrote; empty for a file that is no snapshot."""
    metadata: dict[str, Any] = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    return metadata


def _identity(state: AdapterState) -> dict[str, Any]:
    """The JSON values that must agree for accumulators to have the same meaning in two states."""
    identity = {
        "job_seed": state.job_seed,
        "method": state.method.name,
        "num_bases": state.num_bases,
        "modules": [list(astuple(module)) for module in state.layout.modules],
        "shape": list(state.acc_BN.shape),
    }
    return identity | {f"{state.method.name}.{key}": value for key, value in settings(state.method).items()}
