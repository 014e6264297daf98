"""From the engine's directory of a job to what the job gives away. Blocks: use a thread."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_zo.checkpoint.export import export_merged, export_peft
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log import read_seed_log
from vllm_zo.engine.controller import version_path
from vllm_zo.entrypoints.openai.state_dir import StateDir
from vllm_zo.errors import CorruptLogError

VERSION_FILE = re.compile(r"step-(\d+)\.safetensors")
LAST_FILE = "adapter_config.json"
"""Of an export: where it is there, the others are."""


def published_steps(directory: Path) -> list[int]:
    """Steps whose state the engine has written."""
    found = (VERSION_FILE.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in found if match)


def export_adapter(state: StateDir, job: Mapping[str, Any], step: int) -> bool:
    """Write the PEFT directory of a step, unless it is there; False while the seed log is not that far yet."""
    directory, target = state.job(job["id"]), state.checkpoint(job["id"], step)
    if (target / LAST_FILE).exists():
        return True
    log = read_seed_log(directory / "seeds.log")
    if log.num_steps < step:
        return False
    export_peft(rebuild_state(log, step, snapshot=version_path(directory, step)), job["model_path"], target)
    return True


def export_whole(state: StateDir, job: Mapping[str, Any]) -> None:
    """Write the model that a `fold` job has made."""
    export_merged(job["model_path"], read_seed_log(state.job(job["id"]) / "seeds.log"), state.merged(job["id"]))


def log_position(directory: Path) -> int:
    """Steps of a job that are safely on disk."""
    path = directory / "seeds.log"
    try:
        return read_seed_log(path).num_steps if path.exists() else 0
    except CorruptLogError:
        return 0
