"""How much memory adapter slots take, from a model's configuration alone: no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_zo.config import ZOTrainingConfig
from vllm_zo.errors import ConfigError


@dataclass(frozen=True)
class SlotMemory:
    """Bytes on the device, of one tensor-parallel rank of one.

    Attributes:
        slot: one slot of the stacked LoRA tensors.
        training: all slots of training.
        weights: the model's own weights.
        modules: linear layers with an adapter.
    """

    slot: int
    training: int
    weights: int
    modules: int


def slot_memory(model: str, zo: ZOTrainingConfig, dtype: str = "auto") -> SlotMemory:
    """What `zo` reserves in an engine that serves `model`.

    A slot has A (rank x in) and B (out x rank) for every linear layer, and for embeddings and head where vLLM's LoRA
    carries them, trained or not; vLLM pads both to the slot rank.

    Raises:
        ConfigError: the model or the type is not known.
    """
    from transformers import AutoConfig
    from transformers.models.auto import AutoModelForCausalLM

    from vllm_zo.entrypoints.engine_options import check_local_model

    check_local_model(model, f"--model {model}")
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model}: {str(error).splitlines()[0]}") from error
    head = built.get_output_embeddings()
    linears = [m for m in built.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    width = _dtype(dtype, config).itemsize
    rows = sum(m.in_features + m.out_features for m in linears) + _rows_beside_layers(config)
    slot = zo.slot_rank * width * rows
    weights = width * sum(p.numel() for p in built.parameters())
    return SlotMemory(slot, slot * zo.total_slots, weights, len(linears))


def _rows_beside_layers(config: Any) -> int:
    """In and out features of embeddings and head, for each of the two that the model's class in vLLM names."""
    from vllm.model_executor.models.registry import ModelRegistry

    registered = [ModelRegistry.models[name] for name in config.architectures or () if name in ModelRegistry.models]
    carried = getattr(registered[0].load_model_cls(), "embedding_modules", ()) if registered else ()
    text = config.get_text_config()
    return len(carried) * (int(text.vocab_size) + int(text.hidden_size))


def _dtype(name: str, config: object) -> torch.dtype:
    if name == "auto":
        given = getattr(config, "dtype", None)
        return given if isinstance(given, torch.dtype) and given != torch.float32 else torch.bfloat16
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"--dtype {name}: expected auto, float32, bfloat16 or float16.")
    return found
