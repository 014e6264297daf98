"""Zeroth-order fine-tuning inside vLLM: the public names.

    from vllm_zo import LLM, Classification, LoZO

    llm = LLM("facebook/opt-1.3b", zo_training=True)
    run = llm.finetune(train="train.jsonl", validation="dev.jsonl",
                       objective=Classification("{sentence} It was", [" terrible", " great"]), method=LoZO())

Importing this package does not import vLLM; once vLLM's `LLM` is imported, it accepts `zo_training`, and so does
`AsyncEngineArgs`, of which an `AsyncLLM` is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_zo.compat.import_hook import when_imported
from vllm_zo.config import JobConfig, ZOTrainingConfig
from vllm_zo.errors import ConfigError, CorruptLogError, JobError, RewardError, SlotError, ZOError
from vllm_zo.methods import (
    EGGROLL,
    FZOO,
    MEAZO,
    SGD,
    Adam,
    Conserve,
    FactorizedMeZO,
    KerZOO,
    LoRAFA,
    LoZO,
    MeZO,
    MeZOLoRA,
    Momentum,
    Muon,
    Sign,
    SubZero,
    TeZO,
    ZOMuon,
)
from vllm_zo.objectives import Classification, LanguageModeling, MultipleChoice, Reward

if TYPE_CHECKING:
    from vllm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "LoZO",
    "FactorizedMeZO",
    "FZOO",
    "KerZOO",
    "EGGROLL",
    "TeZO",
    "SubZero",
    "ZOMuon",
    "LoRAFA",
    "MeZOLoRA",
    "MeZO",
    "SGD",
    "Momentum",
    "Adam",
    "MEAZO",
    "Sign",
    "Muon",
    "Conserve",
    "Classification",
    "LanguageModeling",
    "MultipleChoice",
    "Reward",
    "JobConfig",
    "ZOTrainingConfig",
    "ZOError",
    "ConfigError",
    "JobError",
    "RewardError",
    "SlotError",
    "CorruptLogError",
]


def _patch_llm() -> None:
    from vllm_zo.compat import llm

    llm.install()


def _patch_async_engine_args() -> None:
    from vllm_zo.compat import async_llm

    async_llm.install_args()


def _patch_async_llm() -> None:
    from vllm_zo.compat import async_llm

    async_llm.install()


when_imported("vllm.entrypoints.llm", _patch_llm)
when_imported("vllm.engine.arg_utils", _patch_async_engine_args)
when_imported("vllm.v1.engine.async_llm", _patch_async_llm)


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from vllm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
