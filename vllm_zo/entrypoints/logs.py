"""What a terminal sees of the logs: this package's lines, and of vLLM and torch only what is wrong."""

from __future__ import annotations

import logging
import os
import sys
import warnings

ENVIRONMENT = {
    # At WARNING an ordinary start on a CPU prints twenty lines that nobody has to act upon.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def quiet_vllm() -> None:
    """To be called before vLLM is imported. What the user has set in the environment stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it logs before it sets its logging up
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op.*", category=FutureWarning)


def show_ours(level: int = logging.INFO) -> None:
    """Print the lines of `vllm.zo` whatever level vLLM logs at.

    To be called after vLLM is imported: importing it resets the loggers below its own.
    """
    logger = logging.getLogger("vllm.zo")
    logger.setLevel(level)
    logger.propagate = False  # vLLM's handler would drop or repeat them
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
