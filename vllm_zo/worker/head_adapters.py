"""Adapters for the LM head of models whose class in vLLM names none: OPT, Qwen2, Gemma and others.

vLLM gives adapters to the linear layers, and to those embeddings and heads that the model's class lists in
`embedding_modules`. Half of the classes with LoRA list nothing, though their head is built as that of a Llama, and
vLLM's layer with adapters for it fits. The head alone is what a job of labels learns most with (docs/methods.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_zo.methods.targets import LM_HEAD
from vllm_zo.worker.patches import HEAD_ADAPTERS, LARGE_VOCABULARY

LARGEST_VOCABULARY = 258048
"""Entries above which vLLM refuses adapters for a head."""


def give_head_adapters(runner: Any) -> None:
    """Make the runner give its model's head adapters, where vLLM has a layer for them. To be called before it loads the
    model.

    Raises:
        PatchConflictError: another package has replaced what has to be replaced.
    """
    load = runner.load_lora_model

    def load_lora_model(model: Any, *args: Any, **kwargs: Any) -> Any:
        if has_plain_head(model):
            # Of this object: the class's dictionary is that of all models that list nothing.
            model.embedding_modules = {**model.embedding_modules, LM_HEAD: "output_embeddings"}
        return load(model, *args, **kwargs)

    HEAD_ADAPTERS.on(runner, "load_lora_model", load_lora_model)
    _allow_large_vocabularies()


def has_plain_head(model: nn.Module) -> bool:
    """Whether vLLM's layer with adapters fits the head: it is called `lm_head`, has a weight in floating point (a
    quantised one has another), and the logits processor stands beside it and is no class of the model's own, whose
    logits the layer would not compute. It is on the last pipeline stage only."""
    head, processor = getattr(model, LM_HEAD, None), getattr(model, "logits_processor", None)
    weight = getattr(head, "weight", None)
    return (
        isinstance(head, ParallelLMHead)
        and type(processor) is LogitsProcessor
        and isinstance(weight, Tensor)
        and weight.is_floating_point()
    )


def _allow_large_vocabularies() -> None:
    original = LogitsProcessorWithLoRA.create_lora_weights

    def create_lora_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        processor, size = self.base_layer, self.base_layer.vocab_size
        # vLLM reads the size to refuse it and to make B, and nothing else of what it makes depends on it.
        processor.vocab_size = min(size, LARGEST_VOCABULARY)
        try:
            original(self, *args, **kwargs)
        finally:
            processor.vocab_size = size
        if size > LARGEST_VOCABULARY:
            slots, one, _, rank = self.lora_b_stacked.shape
            self.lora_b_stacked = torch.zeros(
                (slots, one, size, rank), dtype=self.lora_b_stacked.dtype, device=self.lora_b_stacked.device
            )

    LARGE_VOCABULARY.apply(LogitsProcessorWithLoRA, "create_lora_weights", create_lora_weights)
