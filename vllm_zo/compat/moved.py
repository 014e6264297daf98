"""Finds names that vLLM has moved from one module to another between releases."""

from __future__ import annotations

import importlib
from typing import Any

from vllm_zo.compat.seams import SUPPORTED_RANGE
from vllm_zo.errors import ConfigError

CLI_ARGUMENTS = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args")
PLACES: dict[str, tuple[str, ...]] = {
    # The first module has it from vLLM 0.32 on, the second in earlier releases.
    "load_chat_template": ("vllm.renderers.chat_utils", "vllm.entrypoints.chat_utils"),
    "ChatCompletionRequest": ("vllm.entrypoints.openai.chat_completion.protocol",),
    # The first module has these up to vLLM 0.32, the second from 0.33 on.
    "resolve_default_chat_template_kwargs": CLI_ARGUMENTS,
    "make_arg_parser": CLI_ARGUMENTS,
    "validate_parsed_serve_args": CLI_ARGUMENTS,
    # The first module has it from vLLM 0.32 on, the second in earlier releases.
    "build_app": ("vllm.entrypoints.launchers.app", "vllm.entrypoints.openai.api_server"),
    "init_app_state": ("vllm.entrypoints.launchers.api_server.app_state", "vllm.entrypoints.openai.api_server"),
    "cli_env_setup": ("vllm.entrypoints.serve.utils.api_utils", "vllm.entrypoints.common.startup"),
}
"""Name -> modules that may define it."""


def find(name: str) -> Any:
    """The object called `name`, from the first of its modules in PLACES that has it.

    Raises:
        ConfigError: no module of this vLLM has it.
    """
    for module in PLACES[name]:
        try:
            return getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise ConfigError(
        f"this vLLM has no {name} in {' or '.join(PLACES[name])}: the training server runs on vLLM {SUPPORTED_RANGE}."
    )
