"""Which parts of vLLM's LoRA layers belong to which Hugging Face module.

vLLM packs q, k and v, and gate and up, into one layer with several slices. Noise, logs and exports use the names of the
separate modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed
from torch import Tensor
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

from vllm_zo.errors import ConfigError
from vllm_zo.methods.plan import ModuleShape
from vllm_zo.methods.targets import LINEAR, kind_of, select_modules


@dataclass(frozen=True)
class Target:
    """One Hugging Face module inside a vLLM LoRA layer.

    Attributes:
        shape: the module's name and its size over all tensor-parallel ranks.
        module: the vLLM layer (a `BaseLayerWithLoRA`) that holds the module.
        slice_index: which of the layer's slices the module is.
        slice_count: number of the checkpoint's modules that the layer stands for.
        a_slots, b_slots: (slots, inputs, LoRA rank) and (slots, outputs, LoRA rank), views of the layer's stacked
            tensors.
        out_slice, in_slice: which of the module's outputs and inputs this tensor-parallel rank holds.
    """

    shape: ModuleShape
    module: Any
    slice_index: int
    slice_count: int
    a_slots: Tensor
    b_slots: Tensor
    out_slice: slice
    in_slice: slice

    @property
    def kind(self) -> str:
        """LINEAR, EMBEDDINGS or LM_HEAD."""
        return kind_of(self.shape.name)

    @property
    def rows(self) -> slice:
        """Which outputs of the layer's weight, its first dimension, belong to this module."""
        sizes = self.module.output_slices
        start = sum(sizes[: self.slice_index])
        return slice(start, start + sizes[self.slice_index])


@dataclass(frozen=True)
class ModuleNames:
    """The names of a model's modules in vLLM, and in the checkpoint, which `peft` and this package use.

    They differ where vLLM has no model class of its own and runs that of `transformers` (its Transformers backend):
    it calls the inner model `model`, the checkpoint calls it by `inner`, e.g. "gpt_neox" or "transformer".

    Example:
        >>> ModuleNames("gpt_neox").of_checkpoint("model.layers.0.mlp.dense_h_to_4h")
        'gpt_neox.layers.0.mlp.dense_h_to_4h'
        >>> ModuleNames("gpt_neox").of_vllm("gpt_neox.layers.0.mlp.dense_h_to_4h")
        'model.layers.0.mlp.dense_h_to_4h'
    """

    inner: str = "model"

    @classmethod
    def of_model(cls, model: Any) -> ModuleNames:
        """Args: model: vLLM's."""
        # Only a model of `transformers` has this attribute.
        return cls(getattr(getattr(model, "model", None), "base_model_prefix", "") or "model")

    def of_checkpoint(self, name: str) -> str:
        return self._renamed(name, "model", self.inner)

    def of_vllm(self, name: str) -> str:
        return self._renamed(name, self.inner, "model")

    @staticmethod
    def _renamed(name: str, old: str, new: str) -> str:
        first, dot, rest = name.partition(".")
        return f"{new}.{rest}" if dot and first == old else name


@dataclass(frozen=True)
class Module:
    """A module that a job can choose, as every worker of the engine knows it.

    Attributes:
        refused: why no job can train it; None if one can.
    """

    shape: ModuleShape
    refused: str | None


def modules_here(lora_manager: Any) -> list[Module]:
    """The modules of this pipeline stage, in the model's order."""
    return [Module(target.shape, _refused(target)) for target in all_targets(lora_manager)]


def modules_of_model(here: list[Module], stages: GroupCoordinator) -> tuple[Module, ...]:
    """The modules of all pipeline stages, in the model's order. The stages call it at the same time.

    Noise, state and log are those of the whole model on every stage, and a job that one refuses must be refused by all.
    """
    of_stage: list[Any] = [here]
    if stages.world_size > 1:
        of_stage = [None] * stages.world_size
        torch.distributed.all_gather_object(of_stage, here, group=stages.cpu_group)
    # By name: the last stage has a copy of embeddings that are the head as well.
    by_name: dict[str, Module] = {}
    for module in (module for modules in of_stage for module in modules):
        by_name.setdefault(module.shape.name, module)
    return tuple(by_name.values())


def choose(modules: Sequence[Module], target_modules: str, target_layers: str | None = None) -> tuple[ModuleShape, ...]:
    """The modules that a job trains, in the model's order: modules of one layer are neighbours.

    Raises:
        ConfigError: `target_modules` or `target_layers` selects nothing, or a module that vLLM has in another form
            than the checkpoint.
    """
    chosen = set(select_modules(target_modules, [module.shape.name for module in modules], target_layers))
    selected = [module for module in modules if module.shape.name in chosen]
    for module in selected:
        if module.refused is not None:
            raise ConfigError(
                f"target_modules={target_modules!r}: {module.shape.name} {module.refused}, which training cannot "
                "write; choose an expression that leaves it out."
            )
    return tuple(module.shape for module in selected)


def _refused(target: Target) -> str | None:
    """Why this worker could train only a part of a module; None if it is whole."""
    layer = target.module
    if target.kind != LINEAR:
        return None
    merged = isinstance(layer.base_layer, MergedColumnParallelLinear | QKVParallelLinear)
    if target.slice_count != layer.n_slices:
        return f"is {target.slice_count} module(s) of the checkpoint and {layer.n_slices} slices of vLLM's layer"
    if layer.n_slices == 1 and merged and layer.tp_size > 1:
        # A rank holds a part of each of the merged weights: no range of the checkpoint's module.
        return f"is merged already in the checkpoint, and tensor_parallel_size={layer.tp_size} cuts it in pieces"
    return None


def find_targets(lora_manager: Any, shapes: Sequence[ModuleShape]) -> tuple[Target, ...]:
    """Where the chosen modules are that this pipeline stage has, in the model's order."""
    chosen = {shape.name for shape in shapes}
    return tuple(target for target in all_targets(lora_manager) if target.shape.name in chosen)


def all_targets(lora_manager: Any) -> list[Target]:
    """Every module of this pipeline stage that a job can train, in the model's order."""
    names = ModuleNames.of_model(lora_manager.model)
    found = {names.of_checkpoint(name): module for name, module in lora_manager.modules.items()}
    return [target for name, module in found.items() for target in _targets(lora_manager, name, module)]


def _targets(manager: Any, name: str, module: Any) -> list[Target]:
    if isinstance(module, BaseLinearLayerWithLoRA) and kind_of(name) == LINEAR:
        return _slices(manager, name, module)
    if isinstance(module, VocabParallelEmbeddingWithLoRA):
        # A token id selects one entry of A, as a one-hot input would: the vocabulary is the module's input.
        return [_whole(module, name, module.lora_a_stacked, module.lora_b_stacked[:, 0])]
    if isinstance(module, LogitsProcessorWithLoRA):
        return [_whole(module, name, module.lora_a_stacked[:, 0].transpose(1, 2), module.lora_b_stacked[:, 0])]
    return []  # not trained: fused experts, and linear layers outside the numbered layers


def _whole(module: Any, name: str, a_slots: Tensor, b_slots: Tensor) -> Target:
    """The target of an embedding or of the LM head: vLLM keeps the whole adapter of these on every rank."""
    rows, columns = b_slots.shape[1], a_slots.shape[1]
    return Target(ModuleShape(name, rows, columns), module, 0, 1, a_slots, b_slots, slice(0, rows), slice(0, columns))


def _slices(manager: Any, layer_name: str, module: Any) -> list[Target]:
    parent, _, leaf = layer_name.rpartition(".")
    names = manager.packed_modules_mapping.get(leaf, [leaf])
    # The mapping goes by the last part of the name. A layer of that name with another number of slices is one module.
    if len(names) != module.n_slices:
        names = [leaf]
    whole = [f"{parent}.{name}" if parent else name for name in names]
    return [_target(module, name, index, len(names)) for index, name in enumerate(whole)]


def _target(module: Any, name: str, index: int, count: int) -> Target:
    a_slots, b_slots = module.lora_a_stacked[index][:, 0].transpose(1, 2), module.lora_b_stacked[index][:, 0]
    out_local, in_local = b_slots.shape[1], a_slots.shape[1]
    tp_size, tp_rank = module.tp_size, module.tp_rank
    # The base layer tells its inputs over all ranks, the stacked tensor those of this rank.
    row_parallel = in_local != module.base_layer.input_size
    out_global, out_start = out_local, 0
    if tp_size > 1 and not row_parallel:
        # If there are fewer k and v heads than ranks, several ranks hold the same shard of k and v: `output_ids` has
        # the number of the shard, which then is not the rank's.
        shard = getattr(module, "output_ids", (tp_rank,) * module.n_slices)[index]
        replicas = getattr(module.base_layer, "num_kv_head_replicas", 1) if index > 0 else 1
        out_global, out_start = out_local * tp_size // replicas, shard * out_local
    in_start = tp_rank * in_local if row_parallel else 0
    return Target(
        ModuleShape(name, out_global, module.base_layer.input_size),
        module,
        index,
        count,
        a_slots,
        b_slots,
        slice(out_start, out_start + out_local),
        slice(in_start, in_start + in_local),
    )
