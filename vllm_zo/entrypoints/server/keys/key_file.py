"""The file of keys: JSON with the projects, their limits, and the hashes of their keys.

    {"projects": {"search": {"jobs": 2, "tokens_a_day": 5000000}},
     "keys": [{"id": "key-8f14e45f", "project": "search", "sha256": "...", "created_at": 1796000000}]}

`vllm-zo keys` writes it. A key itself is in no file: it is shown once.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.errors import ConfigError
from vllm_zo.validation import check_keys, check_optional_int, reject

PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a project may use. None: no limit."""

    jobs: int | None = None
    """Jobs that have not ended."""
    bytes: int | None = None
    """Of all its files together."""
    tokens_a_day: int | None = None
    """Tokens that its jobs train on, a day of UTC."""
    requests_a_minute: int | None = None
    """Requests of any kind."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_optional_int(name, value, 1)


LIMITS = [f.name for f in fields(Limits)]


@dataclass(frozen=True)
class Key:
    """A key, without the key itself. The hash needs no salt and no slowness: a key has 256 random bits."""

    id: str
    project: str
    sha256: str
    created_at: int


@dataclass(frozen=True)
class KeyFile:
    projects: dict[str, Limits] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()

    def find(self, secret: str) -> Key | None:
        wanted = hashed(secret)
        return next((key for key in self.keys if key.sha256 == wanted), None)

    def with_key(self, project: str, limits: Mapping[str, int], now: int) -> tuple[KeyFile, Key, str]:
        """A new key of a project, whose limits change to those given; returns the new file, the key, and its secret.

        Raises:
            ConfigError: the name or a limit cannot be used.
        """
        if not PROJECT.fullmatch(project):
            reject("project", project, "up to 64 letters, digits, '.', '_' or '-', a letter or digit first")
        secret = f"sk-zo-{secrets.token_urlsafe(32)}"
        key = Key(f"key-{secrets.token_hex(4)}", project, hashed(secret), now)
        changed = replace(self.projects.get(project, Limits()), **limits)
        return KeyFile({**self.projects, project: changed}, (*self.keys, key)), key, secret

    def without_key(self, key_id: str) -> KeyFile:
        """The file without a key. A project keeps its limits, its jobs and its files.

        Raises:
            ConfigError: there is no such key.
        """
        left = tuple(key for key in self.keys if key.id != key_id)
        if len(left) == len(self.keys):
            known = ", ".join(key.id for key in self.keys) or "none"
            raise ConfigError(f"key {key_id!r}: not in this file; it has {known}.")
        return KeyFile(self.projects, left)

    def write(self, path: Path) -> None:
        """Raises JobError: the file cannot be written."""
        content = {
            "projects": {
                name: {limit: value for limit, value in asdict(limits).items() if value is not None}
                for name, limits in self.projects.items()
            },
            "keys": [asdict(key) for key in self.keys],
        }
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def read_key_file(path: Path) -> KeyFile:
    """Raises ConfigError: the file cannot be read, or is not what `vllm-zo keys` writes; the message says where."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; `vllm-zo keys add {path} PROJECT` makes such a file.") from error
    except ValueError as error:
        raise ConfigError(f"{path}: no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected an object with projects and keys.")
    check_keys(f"{path}: entry", content, ("projects", "keys"))
    projects = {name: _limits(path, name, given) for name, given in content.get("projects", {}).items()}
    keys = tuple(_key(path, given) for given in content.get("keys", []))
    for key in keys:
        if key.project not in projects:
            raise ConfigError(f"{path}: {key.id} belongs to project {key.project!r}, which is not among the projects.")
    return KeyFile(projects, keys)


def _limits(path: Path, project: str, given: Any) -> Limits:
    if not PROJECT.fullmatch(project) or not isinstance(given, dict):
        raise ConfigError(f"{path}: project {project!r}: expected a name and an object of limits.")
    check_keys(f"{path}: limit of project {project}", given, LIMITS)
    return Limits(**given)


def _key(path: Path, given: Any) -> Key:
    names = [f.name for f in fields(Key)]
    if not isinstance(given, dict) or sorted(given) != sorted(names):
        raise ConfigError(f"{path}: keys: expected objects with {', '.join(names)}, not {given!r:.80}.")
    return Key(**given)
