"""`LLM(..., zo_training=True)` on vLLM's own LLM class, with `finetune`, `evaluate` and `restore_base`."""

from __future__ import annotations

import functools
from typing import Any

from vllm_zo.compat.registry import Patch

ZO_TRAINING = Patch(
    target="vllm.entrypoints.llm:LLM.__init__",
    why="LLM passes unknown keyword arguments to EngineArgs, which rejects zo_training",
    how="turns zo_training into the engine options it stands for",
    upstream="none yet",
    remove_when="EngineArgs has zo_training",
    series="0001-zo-training-option.patch",
    built_in="vllm.engine.arg_utils:EngineArgs.zo_training",
)
TRAINING_CALLS = Patch(
    target="vllm.entrypoints.llm:LLM.*",
    why="LLM has no training calls",
    how="gives the class finetune(), evaluate() and restore_base()",
    upstream="vllm#3159 (fine-tuning, closed as out of scope)",
    remove_when="LLM has training calls",
    series="0006-training-calls.patch",
    built_in="vllm.plugins.training:TrainingMixin",
)


def install() -> None:
    from vllm.entrypoints.llm import LLM

    from vllm_zo.entrypoints.engine_options import engine_options
    from vllm_zo.entrypoints.training import TrainingMixin

    original = LLM.__init__

    @functools.wraps(original)
    def __init__(self: Any, model: str, *, zo_training: Any = None, **kwargs: Any) -> None:
        if zo_training:
            kwargs = engine_options(model, zo_training, kwargs)
        original(self, model, **kwargs)

    ZO_TRAINING.apply(LLM, "__init__", __init__)
    for name in ("finetune", "evaluate", "restore_base"):
        TRAINING_CALLS.apply(LLM, name, getattr(TrainingMixin, name), adds=True)
