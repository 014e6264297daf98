"""Which parts of vLLM's LoRA layers belong to which Hugging Face module.

vLLM packs q/k/v and gate/up into one layer with several slices; noise, logs and exports use the unfused names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from vllm_zo.methods.base import ModuleShape
from vllm_zo.methods.targets import select_modules


@dataclass(frozen=True)
class Target:
    """One Hugging Face linear module inside a vLLM LoRA layer.

    Attributes:
        module: the vLLM layer (a `BaseLayerWithLoRA`), its name, and the slice of its stacked tensors.
        out_slice, in_slice: this rank's rows of the global U and V.
    """

    shape: ModuleShape
    layer_name: str
    module: Any
    slice_index: int
    out_slice: slice
    in_slice: slice


def find_targets(lora_manager: Any, target_modules: str) -> tuple[Target, ...]:
    """The linear modules in scope, in the model's order.

    Raises:
        ConfigError: `target_modules` selects nothing.
    """
    targets = [t for name, module in lora_manager.modules.items() for t in _slices(lora_manager, name, module)]
    chosen = set(select_modules(target_modules, [t.shape.name for t in targets]))
    return tuple(t for t in targets if t.shape.name in chosen)


def _slices(manager: Any, layer_name: str, module: Any) -> list[Target]:
    if not isinstance(module, BaseLinearLayerWithLoRA):
        return []  # embeddings, logits processor, fused experts
    parent, _, leaf = layer_name.rpartition(".")
    names = manager.packed_modules_mapping.get(leaf, [leaf])
    if len(names) != module.n_slices:
        names = [leaf]
    return [_target(module, f"{parent}.{name}" if parent else name, layer_name, i) for i, name in enumerate(names)]


def _target(module: Any, name: str, layer_name: str, index: int) -> Target:
    out_local = module.lora_b_stacked[index].shape[2]
    in_local = module.lora_a_stacked[index].shape[3]
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
        layer_name,
        module,
        index,
        slice(out_start, out_start + out_local),
        slice(in_start, in_start + in_local),
    )
