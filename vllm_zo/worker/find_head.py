"""Finds the LM head of a model: what its own `compute_logits` hands to its logits processor.

Models keep their head under different names: `lm_head`, `output`, or the embeddings themselves (Gemma 2, Cohere).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from vllm_zo.errors import ConfigError


@dataclass(frozen=True)
class FoundHead:
    """The head of a model.

    Attributes:
        lm_head: vLLM's `ParallelLMHead`, or the `VocabParallelEmbedding` that is the head as well.
        processor: vLLM's `LogitsProcessor`, or the layer with adapters around it.
    """

    lm_head: Any
    processor: Any


def find_head(model: Any, hidden_size: int, dtype: torch.dtype, device: torch.device) -> FoundHead:
    """Call `model.compute_logits` with a logits processor that only looks at what it gets.

    Args:
        hidden_size: D of the model's hidden states.

    Raises:
        ConfigError: the model changes the hidden states before the head, or the logits behind it: the head alone gives
            other logits.
    """
    hidden = torch.randn(1, hidden_size, dtype=dtype, device=device)
    logits = torch.zeros(1, 1, device=device)
    seen: list[tuple[Any, Any, Tensor]] = []

    def look(processor: Any, lm_head: Any, given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((processor, lm_head, given))
        return logits

    processors = [m for m in model.modules() if isinstance(m, LogitsProcessor | LogitsProcessorWithLoRA)]
    for processor in processors:
        processor.forward = functools.partial(look, processor)
    try:
        answer = model.compute_logits(hidden)
    finally:
        for processor in processors:
            del processor.forward  # the instance's; the class has its own
    name = type(model).__name__
    if not seen:
        raise ConfigError(f"{name} computes its logits in a way of its own; choose a model of another architecture.")
    processor, lm_head, given = seen[0]
    if answer is not logits or not torch.equal(given, hidden):
        raise ConfigError(
            f"{name} changes the hidden states before its LM head or the logits behind it, and training scores with "
            "the head alone; choose a model of another architecture."
        )
    # An embedding that can have adapters is wrapped; as a head it has none.
    return FoundHead(getattr(lm_head, "base_layer", lm_head), processor)
