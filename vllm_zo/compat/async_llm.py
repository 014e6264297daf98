"""`AsyncEngineArgs(..., zo_training=True)`, and `finetune`, `evaluate` and `restore_base` on vLLM's `AsyncLLM`."""

from __future__ import annotations

import functools
from typing import Any

from vllm_zo.compat.registry import Patch
from vllm_zo.errors import ConfigError

ZO_TRAINING_ARGS = Patch(
    target="vllm.engine.arg_utils:AsyncEngineArgs.__init__",
    why="an AsyncLLM is made from these arguments, which do not know zo_training",
    how="turns zo_training into the engine options it stands for",
    upstream="none yet",
    remove_when="EngineArgs has zo_training",
    series="0001-zo-training-option.patch",
    built_in="vllm.engine.arg_utils:EngineArgs.zo_training",
)
ASYNC_TRAINING = Patch(
    target="vllm.v1.engine.async_llm:AsyncLLM.*",
    why="a front end that serves on an event loop must be able to train as well",
    how="gives the class finetune(), evaluate() and restore_base(), to be awaited",
    upstream="none yet",
    remove_when="AsyncLLM has training calls",
    series="0006-training-calls.patch",
    built_in="vllm.plugins.training:TrainingMixin",
)


def install_args() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    original = AsyncEngineArgs.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, zo_training: Any = None, **kwargs: Any) -> None:
        if zo_training:
            from vllm_zo.entrypoints.engine_options import engine_options

            if "model" not in kwargs:
                raise ConfigError("AsyncEngineArgs(zo_training=...): name the model, model=...")
            kwargs = engine_options(kwargs["model"], zo_training, kwargs)
        original(self, *args, **kwargs)

    ZO_TRAINING_ARGS.apply(AsyncEngineArgs, "__init__", __init__)


def install() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_zo.entrypoints.async_training import AsyncTrainingMixin

    for name in ("finetune", "evaluate", "restore_base"):
        ASYNC_TRAINING.apply(AsyncLLM, name, getattr(AsyncTrainingMixin, name), adds=True)
