"""Names that vLLM has moved from module to module between releases: found by looking, not by version."""

from __future__ import annotations

import importlib
from typing import Any

from vllm_zo.errors import ConfigError

CLI_ARGUMENTS = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args")
PLACES: dict[str, tuple[str, ...]] = {
    "load_chat_template": ("vllm.renderers.chat_utils", "vllm.entrypoints.chat_utils"),  # from 0.32; before
    "make_arg_parser": CLI_ARGUMENTS,  # before 0.33; from 0.33
    "validate_parsed_serve_args": CLI_ARGUMENTS,
    "cli_env_setup": ("vllm.entrypoints.serve.utils.api_utils", "vllm.entrypoints.common.startup"),  # the same
}
"""Name -> modules that may define it."""


def find(name: str) -> Any:
    """The object called `name` in PLACES.

    Raises:
        ConfigError: this vLLM has it in none of them.
    """
    for module in PLACES[name]:
        try:
            return getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise ConfigError(
        f"this vLLM has no {name} in {' or '.join(PLACES[name])}: the training server runs on vLLM 0.30 to 0.33."
    )
