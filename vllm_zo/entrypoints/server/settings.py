"""The settings of the server, apart from vLLM's own flags and the engine's `zo_training` options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_zo.objectives.rollout import check_url
from vllm_zo.validation import check_bool, check_int, check_keys, check_optional_str, reject

SETTINGS_KEY = "zo_server"
"""Name in vLLM's `additional_config`, beside "zo_training"."""
DEFAULT_STATE_DIR = "vllm-zo-state"
DEFAULT_SLOWDOWN = 1.1
"""How many times as long training may make what requests wait for."""
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Options of the training server.

    Example:
        >>> ServerSettings.from_config({"zo_server": {"upload_limit_mb": 8}}).upload_limit_bytes
        8388608
    """

    upload_limit_mb: int = 512
    """Largest file that a client may upload, in MiB (OpenAI's own limit is 512)."""
    allow_python_graders: bool = False
    """Run Python code that clients send in graders. It runs with the rights of the server, so set this for trusted
    clients only."""

    rollout_hosts: tuple[str, ...] = ()
    """Hosts ("host" or "host:port") to which jobs of clients may post rollouts. None: no job may."""
    rollout_base_url: str | None = None
    """This server's address as those hosts reach it, without a path."""

    keys: str | None = None
    """The file of `vllm-zo keys`: projects and the hashes of their keys. None: there are no projects."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rollout_hosts", tuple(self.rollout_hosts))
        if not all(isinstance(host, str) and host and "/" not in host for host in self.rollout_hosts):
            reject("zo_server.rollout_hosts", self.rollout_hosts, "names of hosts, such as grader.example.org:8443")
        if self.rollout_base_url is not None:
            check_url(self.rollout_base_url)
        check_optional_str("zo_server.keys", self.keys, "the path of a file that `vllm-zo keys add` has made")
        check_int("zo_server.upload_limit_mb", self.upload_limit_mb, 1)
        check_bool("zo_server.allow_python_graders", self.allow_python_graders)

    @classmethod
    def from_config(cls, additional_config: Mapping[str, Any]) -> ServerSettings:
        """Read the settings from vLLM's `additional_config`.

        Raises:
            ConfigError: an option is unknown (the message has the nearest name), or a value is out of range.
        """
        given = additional_config.get(SETTINGS_KEY, {})
        check_keys(f"{SETTINGS_KEY} option", given, [f.name for f in fields(cls)])
        return cls(**given)

    @property
    def upload_limit_bytes(self) -> int:
        return self.upload_limit_mb * MIB
