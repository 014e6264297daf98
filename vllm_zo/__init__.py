"""Zeroth-order fine-tuning inside vLLM. This module holds the public names.

    from vllm_zo import LLM, Classification, LoZO

    llm = LLM("facebook/opt-1.3b", zo_training=True)
    run = llm.finetune(train="train.jsonl", validation="dev.jsonl",
                       objective=Classification("{sentence} It was", [" terrible", " great"]), method=LoZO())

Importing this package does not import vLLM. When a program imports vLLM afterwards (or has done so before), its `LLM`
accepts `zo_training`. So does `AsyncEngineArgs`, from which a program makes an `AsyncLLM`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import wrapt

from vllm_zo.config import JobConfig, ZOTrainingConfig
from vllm_zo.entrypoints.llm.patches import WHEN_IMPORTED
from vllm_zo.errors import ConfigError, CorruptLogError, JobError, RewardError, SlotError, ZOError
from vllm_zo.methods import (
    EGGROLL,
    FZOO,
    MEAZO,
    SGD,
    Adam,
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
from vllm_zo.objectives import Classification, LanguageModeling, MultipleChoice, Preference, Reward, Rollout

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_zo.entrypoints.cluster.cluster import Cluster
    from vllm_zo.entrypoints.llm.cpu_defaults import apply_cpu_defaults

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Cluster",
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
    "Classification",
    "LanguageModeling",
    "MultipleChoice",
    "Preference",
    "Reward",
    "Rollout",
    "apply_cpu_defaults",
    "JobConfig",
    "ZOTrainingConfig",
    "ZOError",
    "ConfigError",
    "JobError",
    "RewardError",
    "SlotError",
    "CorruptLogError",
]


# A hook instead of an import: importing vLLM takes seconds and reads environment variables (its logging level) that the
# program may still want to set. wrapt runs a hook at once if the module is imported already.
for _module, _install in WHEN_IMPORTED.items():
    wrapt.register_post_import_hook(_install, _module)


# These names need more than this module should load: vLLM itself, torch's threads, or what starts processes.
def __getattr__(name: str) -> Any:
    if name == "LLM":
        from vllm import LLM

        return LLM
    if name == "Cluster":
        from vllm_zo.entrypoints.cluster.cluster import Cluster

        return Cluster
    if name == "apply_cpu_defaults":
        from vllm_zo.entrypoints.llm.cpu_defaults import apply_cpu_defaults

        return apply_cpu_defaults
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
