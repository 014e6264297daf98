"""The general plugin of vLLM, entry point `zo` of `vllm.general_plugins`: vLLM loads it in every process."""

from __future__ import annotations

import logging

from vllm_zo.compat.registry import PatchConflictError
from vllm_zo.entrypoints.llm.requirements import require_patches

logger = logging.getLogger("vllm.zo.compat")


def install() -> None:
    """Apply the patches that every process needs.

    vLLM calls this whether its engine trains or not. If the patches do not fit this vLLM, the engine gets a warning and
    serves without them; only an engine that is to train raises the error.
    """
    try:
        require_patches()
    except PatchConflictError as error:
        logger.warning("vllm-zo cannot train with this vLLM: %s", error)
