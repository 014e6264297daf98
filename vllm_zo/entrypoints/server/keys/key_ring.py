"""Which keys a server with `--zo-keys` knows."""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from vllm_zo.entrypoints.server.keys.key_file import Key, KeyFile, Limits, hashed, read_key_file
from vllm_zo.errors import ConfigError

logger = logging.getLogger("vllm.zo.server")


class KeyRing:
    """The file of keys as it is now: `vllm-zo keys` may change it while the server runs.

    Args:
        operator: the server's own keys (`--api-key`).

    Raises:
        ConfigError: the file cannot be read.
    """

    def __init__(self, path: Path, operator: Sequence[str]) -> None:
        self._path, self._operator_keys = path, list(operator)
        self._stamp = _stamp(path)
        self._file = read_key_file(path)

    @property
    def operator(self) -> str:
        """One of the operator's keys, for vLLM's check."""
        return self._operator_keys[0]

    def is_operators(self, secret: str) -> bool:
        # All of them, and their hashes: the time it takes says nothing of a key.
        return any([hmac.compare_digest(hashed(secret), hashed(known)) for known in self._operator_keys])

    def find(self, secret: str) -> Key | None:
        return self._now().find(secret)

    def limits(self, project: str) -> Limits:
        return self._now().projects.get(project, Limits())

    def _now(self) -> KeyFile:
        try:
            if (stamp := _stamp(self._path)) != self._stamp:
                self._file = read_key_file(self._path)
                self._stamp = stamp
        except (ConfigError, OSError) as error:
            # The keys of before stay valid: a file that is half edited must not shut everybody out.
            logger.error("--zo-keys: %s; the keys of before stay in force", error)
        return self._file


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None  # reading it says what to do
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
