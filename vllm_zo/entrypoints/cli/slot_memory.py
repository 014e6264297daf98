"""How much memory adapter slots take, calculated from the model's configuration. It loads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_zo.config import ZOTrainingConfig
from vllm_zo.errors import ConfigError
from vllm_zo.methods.plan import ModuleShape


@dataclass(frozen=True)
class SlotMemory:
    """Bytes on a device that holds the whole model (no tensor parallelism).

    Attributes:
        slot: one slot of the stacked LoRA tensors.
        training: all slots of training.
        weights: the model's own weights.
        modules: linear layers with an adapter, by their Hugging Face names.
    """

    slot: int
    training: int
    weights: int
    modules: tuple[ModuleShape, ...]


def slot_memory(model: str, zo: ZOTrainingConfig, dtype: str = "auto") -> SlotMemory:
    """The memory that `zo` reserves in an engine that serves `model`.

    A slot has A (rank x in) and B (out x rank) for every linear layer, and for embeddings and head where vLLM's LoRA
    supports them. Layers that a job does not train count too, and vLLM pads both factors to the slot rank.

    Raises:
        ConfigError: there is no such model, or no such dtype.
    """
    from transformers import AutoConfig
    from transformers.models.auto import AutoModelForCausalLM

    from vllm_zo.entrypoints.llm.options import check_local_model

    check_local_model(model, f"--model {model}")
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):  # shapes without memory, for a model of any size
            built = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model}: {str(error).splitlines()[0]}") from error
    # The head is a Linear too; `_rows_beside_layers` counts it, if vLLM gives it an adapter at all.
    head = built.get_output_embeddings()
    linears = tuple(
        ModuleShape(name, m.out_features, m.in_features)
        for name, m in built.named_modules()
        if isinstance(m, torch.nn.Linear) and m is not head
    )
    width = _dtype(dtype, config).itemsize
    rows = sum(m.in_features + m.out_features for m in linears) + _rows_beside_layers(config)
    slot = zo.slot_rank * width * rows
    weights = width * sum(p.numel() for p in built.parameters())
    return SlotMemory(slot, slot * zo.total_slots, weights, linears)


def _rows_beside_layers(config: Any) -> int:
    """In plus out features of embeddings and head, of those that vLLM's class of the model lists for LoRA."""
    from vllm.model_executor.models.registry import ModelRegistry

    registered = [ModelRegistry.models[name] for name in config.architectures or () if name in ModelRegistry.models]
    carried = getattr(registered[0].load_model_cls(), "embedding_modules", ()) if registered else ()
    text = config.get_text_config()
    return len(carried) * (int(text.vocab_size) + int(text.hidden_size))


def _dtype(name: str, config: object) -> torch.dtype:
    if name == "auto":
        # As vLLM's "auto": it loads a float32 checkpoint in the platform's half precision, bfloat16 on most.
        given = getattr(config, "dtype", None)
        return given if isinstance(given, torch.dtype) and given != torch.float32 else torch.bfloat16
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"--dtype {name}: expected auto, float32, bfloat16 or float16.")
    return found
