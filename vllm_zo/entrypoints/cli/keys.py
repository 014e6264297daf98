"""`vllm-zo keys add | ls | rm`: the file that `vllm-zo serve --zo-keys` reads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from vllm_zo.entrypoints.server.keys.key_file import KeyFile, read_key_file


def add(path: Path, project: str, limits: Mapping[str, int]) -> str:
    """Write a new key into the file; returns what to tell. Raises ConfigError, JobError: it cannot be done."""
    before = read_key_file(path) if path.exists() else KeyFile()
    after, key, secret = before.with_key(project, limits, int(time.time()))
    after.write(path)
    return f"{secret}\n{key.id} of project {project}. The key is shown this once: {path} has only its hash."


def remove(path: Path, key_id: str) -> str:
    """Take a key out of the file; returns what to tell. Raises ConfigError, JobError: it cannot be done."""
    read_key_file(path).without_key(key_id).write(path)
    return f"{key_id} is gone."


def listing(path: Path) -> str:
    """The projects of the file, each with its keys. Raises ConfigError: the file cannot be read."""
    file = read_key_file(path)
    lines = []
    for project, limits in file.projects.items():
        given = [f"{name} {value}" for name, value in asdict(limits).items() if value is not None]
        lines.append(f"{project}: {', '.join(given) or 'no limits'}")
        for key in file.keys:
            if key.project == project:
                lines.append(f"  {key.id}  {time.strftime('%Y-%m-%d', time.gmtime(key.created_at))}")
    return "\n".join(lines) or f"{path} has no projects."
