"""Patches that give vLLM's `LLM`, `AsyncEngineArgs` and `AsyncLLM` the option `zo_training` and the training calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_zo.compat.registry import Patch
from vllm_zo.errors import ConfigError

ZO_TRAINING = Patch(
    target="vllm.entrypoints.llm:LLM.__init__",
    why="LLM passes unknown keyword arguments to EngineArgs, which rejects zo_training",
    how="turns zo_training into the engine options it stands for",
    upstream="none yet",
    remove_when="EngineArgs has zo_training",
    series="0001-zo-training-option.patch",
    built_in="vllm.engine.arg_utils:EngineArgs.zo_training",
)
ZO_TRAINING_ARGS = Patch(
    target="vllm.engine.arg_utils:AsyncEngineArgs.__init__",
    why="an AsyncLLM is made from these arguments, which do not know zo_training",
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
ASYNC_TRAINING = Patch(
    target="vllm.v1.engine.async_llm:AsyncLLM.*",
    why="a front end that serves on an event loop must be able to train as well",
    how="gives the class finetune(), evaluate() and restore_base(), to be awaited",
    upstream="none yet",
    remove_when="AsyncLLM has training calls",
    series="0006-training-calls.patch",
    built_in="vllm.plugins.training:TrainingMixin",
)
CALLS = ("finetune", "evaluate", "restore_base")


def install_on_llm(module: Any) -> None:
    """Let `LLM` take `zo_training=...`, and give it the training calls."""
    from vllm_zo.entrypoints.llm.mixin import TrainingMixin
    from vllm_zo.entrypoints.llm.options import engine_options

    LLM = module.LLM
    original = LLM.__init__

    @functools.wraps(original)
    def __init__(self: Any, model: str, *, zo_training: Any = None, **kwargs: Any) -> None:
        if zo_training:
            kwargs = engine_options(model, zo_training, kwargs)
        original(self, model, **kwargs)

    ZO_TRAINING.apply(LLM, "__init__", __init__)
    for name in CALLS:
        TRAINING_CALLS.apply(LLM, name, getattr(TrainingMixin, name), adds=True)


def install_on_async_args(module: Any) -> None:
    """Let `AsyncEngineArgs` take `zo_training=...`."""
    AsyncEngineArgs = module.AsyncEngineArgs
    original = AsyncEngineArgs.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, zo_training: Any = None, **kwargs: Any) -> None:
        if zo_training:
            from vllm_zo.entrypoints.llm.options import engine_options

            if "model" not in kwargs:
                raise ConfigError("AsyncEngineArgs(zo_training=...): name the model, model=...")
            kwargs = engine_options(kwargs["model"], zo_training, kwargs)
        original(self, *args, **kwargs)

    ZO_TRAINING_ARGS.apply(AsyncEngineArgs, "__init__", __init__)


def install_on_async_llm(module: Any) -> None:
    """Give `AsyncLLM` the training calls."""
    from vllm_zo.entrypoints.llm.async_mixin import AsyncTrainingMixin

    for name in CALLS:
        ASYNC_TRAINING.apply(module.AsyncLLM, name, getattr(AsyncTrainingMixin, name), adds=True)


WHEN_IMPORTED: dict[str, Callable[[Any], None]] = {
    "vllm.entrypoints.llm": install_on_llm,
    "vllm.engine.arg_utils": install_on_async_args,
    "vllm.v1.engine.async_llm": install_on_async_llm,
}
"""Module of vLLM -> the function that patches it once the program has imported it. To import vLLM only to patch it
would take many seconds."""
