"""Sets up logging so that the terminal shows every line of this package, and only the errors of vLLM and torch."""

from __future__ import annotations

import logging
import os
import sys
import warnings

ENVIRONMENT = {
    # At WARNING an ordinary start on a CPU prints twenty lines that ask for no action.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def quiet_vllm() -> None:
    """Silence vLLM; call it before vLLM is imported. Variables that the user has set stay."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # The variable acts when vLLM configures its logging; some of its modules log before that.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op.*", category=FutureWarning)


def show_ours(level: int = logging.INFO) -> None:
    """Print the lines of `vllm.zo` from `level` on, whatever level vLLM logs at.

    Call it after vLLM is imported: vLLM's `dictConfig` of the logger `vllm` resets all loggers below it.
    """
    logger = logging.getLogger("vllm.zo")
    logger.setLevel(level)
    logger.propagate = False  # vLLM's handler would drop them at its level, or print them a second time
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]  # replaced, not added: a second call must not print every line twice
