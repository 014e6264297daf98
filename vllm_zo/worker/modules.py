"""Which parts of vLLM's LoRA layers belong to which Hugging Face module.

vLLM packs q/k/v and gate/up into one layer with several slices; noise, logs and exports use the unfused names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA

from vllm_zo.methods.base import ModuleShape
from vllm_zo.methods.targets import LINEAR, kind_of, select_modules


@dataclass(frozen=True)
class Target:
    """One Hugging Face module inside a vLLM LoRA layer.

    Attributes:
        module: the vLLM layer (a `BaseLayerWithLoRA`), and which of its slices.
        a_pages: (slots, in, rank) and b_pages: (slots, out, rank), views of the layer's stacked tensors.
        out_slice, in_slice: this rank's rows of the global U and V.
    """

    shape: ModuleShape
    module: Any
    slice_index: int
    a_pages: Tensor
    b_pages: Tensor
    out_slice: slice
    in_slice: slice

    @property
    def kind(self) -> str:
        return kind_of(self.shape.name)


def find_targets(lora_manager: Any, target_modules: str) -> tuple[Target, ...]:
    """The modules in scope, in the model's order.

    Raises:
        ConfigError: `target_modules` selects nothing.
    """
    targets = [t for name, module in lora_manager.modules.items() for t in _targets(lora_manager, name, module)]
    chosen = set(select_modules(target_modules, [t.shape.name for t in targets]))
    return tuple(t for t in targets if t.shape.name in chosen)


def _targets(manager: Any, name: str, module: Any) -> list[Target]:
    if isinstance(module, BaseLinearLayerWithLoRA) and kind_of(name) == LINEAR:
        return _slices(manager, name, module)
    if isinstance(module, VocabParallelEmbeddingWithLoRA):  # A has a row a token, like an input that is one-hot
        return [_whole(module, name, module.lora_a_stacked, module.lora_b_stacked[:, 0])]
    if isinstance(module, LogitsProcessorWithLoRA):
        return [_whole(module, name, module.lora_a_stacked[:, 0].transpose(1, 2), module.lora_b_stacked[:, 0])]
    return []  # projections beside the layers, fused experts


def _whole(module: Any, name: str, a_pages: Tensor, b_pages: Tensor) -> Target:
    """Embeddings and head: vLLM keeps the whole adapter on every rank."""
    rows, columns = b_pages.shape[1], a_pages.shape[1]
    return Target(ModuleShape(name, rows, columns), module, 0, a_pages, b_pages, slice(0, rows), slice(0, columns))


def _slices(manager: Any, layer_name: str, module: Any) -> list[Target]:
    parent, _, leaf = layer_name.rpartition(".")
    names = manager.packed_modules_mapping.get(leaf, [leaf])
    if len(names) != module.n_slices:
        names = [leaf]
    return [_target(module, f"{parent}.{name}" if parent else name, i) for i, name in enumerate(names)]


def _target(module: Any, name: str, index: int) -> Target:
    a_pages, b_pages = module.lora_a_stacked[index][:, 0].transpose(1, 2), module.lora_b_stacked[index][:, 0]
    out_local, in_local = b_pages.shape[1], a_pages.shape[1]
    tp_size, tp_rank = module.tp_size, module.tp_rank
    row_parallel = in_local != module.base_layer.input_size
    out_global, out_start = out_local, 0
    if tp_size > 1 and not row_parallel:
        shard = getattr(module, "output_ids", (tp_rank,) * module.n_slices)[index]
        replicas = getattr(module.base_layer, "num_kv_head_replicas", 1) if index > 0 else 1
        out_global, out_start = out_local * tp_size // replicas, shard * out_local
    in_start = tp_rank * in_local if row_parallel else 0
    return Target(
        ModuleShape(name, out_global, module.base_layer.input_size),
        module,
        index,
        a_pages,
        b_pages,
        slice(out_start, out_start + out_local),
        slice(in_start, in_start + in_local),
    )
