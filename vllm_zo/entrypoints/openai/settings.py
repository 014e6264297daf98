"""What an operator may set about the server, apart from vLLM's own flags and the engine's `zo_training` options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_zo.validation import check_bool, check_int, check_keys

SETTINGS_KEY = "zo_server"
"""Name in vLLM's `additional_config`, beside "zo_training"."""
DEFAULT_STATE_DIR = "vllm-zo-state"
DEFAULT_TOKEN_BUDGET = 32
"""Training tokens in an engine step that also serves: benchmarks/serving.py, docs/benchmarks.md."""
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Options of the training server.

    Example:
        >>> ServerSettings.from_config({"zo_server": {"upload_limit_mb": 8}}).upload_limit_bytes
        8388608
    """

    upload_limit_mb: int = 512
    """Largest file that may be uploaded, in MiB (OpenAI's own limit is 512)."""
    allow_python_graders: bool = False
    """Run Python code that clients send in graders. It runs with the rights of the server: for trusted clients only."""

    def __post_init__(self) -> None:
        check_int("zo_server.upload_limit_mb", self.upload_limit_mb, 1)
        check_bool("zo_server.allow_python_graders", self.allow_python_graders)

    @classmethod
    def from_config(cls, additional_config: Mapping[str, Any]) -> ServerSettings:
        """From vLLM's `additional_config`.

        Raises:
            ConfigError: an unknown option (with the nearest name), or a value out of range.
        """
        given = additional_config.get(SETTINGS_KEY, {})
        check_keys(f"{SETTINGS_KEY} option", given, [f.name for f in fields(cls)])
        return cls(**given)

    @property
    def upload_limit_bytes(self) -> int:
        return self.upload_limit_mb * MIB
