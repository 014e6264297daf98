"""The general plugin of vLLM, entry point `zo` of `vllm.general_plugins`: vLLM loads it in every process."""

from __future__ import annotations

import logging
import sys

from vllm_zo.compat.registry import PatchConflictError
from vllm_zo.entrypoints.llm.requirements import require_patches

logger = logging.getLogger("vllm.zo.compat")

SERVER = "vllm.entrypoints.launchers.api_server.entry"
"""What a process that becomes a server has imported before it loads its plugins."""


def install() -> None:
    """Apply the patches that every process needs.

    vLLM calls this whether its engine trains or not. If the patches do not fit this vLLM, the engine gets a warning and
    serves without them; only an engine that is to train raises the error.
    """
    try:
        require_patches()
        if SERVER in sys.modules:
            from vllm_zo.entrypoints.server.patches import bound_the_start

            bound_the_start()
    except PatchConflictError as error:
        logger.warning("vllm-zo cannot train with this vLLM: %s", error)
