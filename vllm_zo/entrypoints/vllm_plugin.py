"""What a vLLM with `patches/` applied loads for `zo_training`: entry point `zo` of `vllm.training_plugins`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.engine_options import engine_options


class TrainingPlugin:
    """vLLM asks for the engine options when an engine is made, and hands the training calls of its front ends on."""

    endpoint_plugins = ("zo_server",)

    def engine_options(self, engine_args: Any, options: bool | Mapping[str, Any] | ZOTrainingConfig) -> dict[str, Any]:
        """The fields of `engine_args` (vLLM's EngineArgs) that training sets.

        Raises:
            ConfigError: an option or a model that training cannot work with.
        """
        given = {f.name: getattr(engine_args, f.name) for f in fields(engine_args) if f.init}
        given = {name: value for name, value in given.items() if value != _default(engine_args, name)}
        model = given.pop("model", engine_args.model)
        given.pop("zo_training", None)
        wanted = engine_options(model, options, given)
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
    """Our functions for an `LLM` or an `AsyncLLM`; they want nothing of it but its engine."""
    from vllm.v1.engine.async_llm import AsyncLLM

    if isinstance(engine, AsyncLLM):
        from vllm_zo.entrypoints.async_training import AsyncTrainingMixin

        return AsyncTrainingMixin
    from vllm_zo.entrypoints.training import TrainingMixin

    return TrainingMixin
