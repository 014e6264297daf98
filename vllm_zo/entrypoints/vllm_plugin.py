"""The plugin that a vLLM with `patches/` applied loads for `zo_training`: entry point `zo` of `vllm.training_plugins`.

A vLLM without those patches never loads it; there `llm/patches.py` does the same at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.llm.options import engine_options


class TrainingPlugin:
    """vLLM asks it for options when it makes an engine, and passes it the training calls of `LLM` and `AsyncLLM`."""

    endpoint_plugins = ("zo_server",)

    def engine_options(self, engine_args: Any, options: bool | Mapping[str, Any] | ZOTrainingConfig) -> dict[str, Any]:
        """The fields of `engine_args` (vLLM's EngineArgs) that training sets, with their values.

        Raises:
            ConfigError: training cannot work with an option or with the model.
            PatchConflictError: another plugin has replaced what training patches.
        """
        given = {f.name: getattr(engine_args, f.name) for f in fields(engine_args) if f.init}
        # EngineArgs does not tell what the user gave: a field that differs from its default counts as given.
        given = {name: value for name, value in given.items() if value != _default(engine_args, name)}
        model = given.pop("model", engine_args.model)
        given.pop("zo_training", None)
        wanted = engine_options(model, options, given)
        # By identity: `engine_options` passes an option that it leaves alone on as the same object.
        return {name: value for name, value in wanted.items() if name not in given or given[name] is not value}

    def finetune(self, engine: Any, *args: Any, **kwargs: Any) -> Any:
        return _calls_of(engine).finetune(engine, *args, **kwargs)

    def evaluate(self, engine: Any, *args: Any, **kwargs: Any) -> Any:
        return _calls_of(engine).evaluate(engine, *args, **kwargs)

    def restore_base(self, engine: Any, *args: Any, **kwargs: Any) -> Any:
        return _calls_of(engine).restore_base(engine, *args, **kwargs)


def _default(engine_args: Any, name: str) -> Any:
    field = type(engine_args).__dataclass_fields__[name]
    return field.default if field.default is not MISSING else field.default_factory()


def _calls_of(engine: Any) -> Any:
    """The class whose functions train an `LLM` or an `AsyncLLM`. They use nothing of the object but its engine, so they
    also work on an object that is not an instance of that class."""
    from vllm.v1.engine.async_llm import AsyncLLM

    if isinstance(engine, AsyncLLM):
        from vllm_zo.entrypoints.llm.async_mixin import AsyncTrainingMixin

        return AsyncTrainingMixin
    from vllm_zo.entrypoints.llm.mixin import TrainingMixin

    return TrainingMixin
