"""Base weights of linear layers: every read and every change of them goes through `BaseWeights`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from vllm_zo.errors import ConfigError
from vllm_zo.worker.lora_targets import Target


def check_writable(layer: Any, name: str) -> None:
    """Check that a fold can write into the weights of `layer`. `name` names the layer in messages.

    Raises:
        ConfigError: the layer is not linear, or its weights are quantised.
    """
    if not isinstance(layer, LinearBase):
        raise ConfigError(
            f"update_space='fold' writes the weights of linear layers, and {name} is none: train with "
            "update_space='bank', or choose other target_modules."
        )
    if not isinstance(layer.quant_method, UnquantizedLinearMethod):
        raise ConfigError(
            f"update_space='fold' writes the base weights, and {name} is quantised "
            f"({type(layer.quant_method).__name__}): train with update_space='bank'."
        )


class BaseWeights:
    """Reads and changes the base weights of linear layers, and keeps the original of each changed weight on the host.

    A layer is vLLM's `LinearBase`. It may hold several modules side by side: its weight is (outputs of all its modules,
    inputs), as far as this tensor-parallel rank has them. This class serves layers that multiply with `layer.weight`
    itself; `cpu/packed_weights.py` serves layers that multiply with a packed copy.
    """

    def __init__(self) -> None:
        self._originals: dict[int, tuple[Any, Tensor]] = {}
        """id of a layer -> the layer, which is kept so that no other object gets its id, and its original weight."""

    def read(self, layer: Any) -> Tensor:
        """A copy of the weight that the layer multiplies with: (O, I), in the model's dtype."""
        weight: Tensor = layer.weight.detach().clone()
        return weight

    def original(self, layer: Any) -> Tensor:
        """The weight as it was before the first change: (O, I), in the model's dtype. The caller must not change it.

        It is on the host if the layer has been changed, else on the device.
        """
        kept = self._originals.get(id(layer))
        return self.read(layer) if kept is None else kept[1]

    @contextmanager
    def edit(self, layer: Any) -> Iterator[Tensor]:
        """Give the weight, (O, I), to change in place. After the block the layer multiplies with the result.

        The first edit of a layer keeps its original for `restore`.
        """
        if id(layer) not in self._originals:
            original = self.read(layer)
            self._originals[id(layer)] = (layer, original.cpu())
            self._unpack(layer, original)
        yield layer.weight.data
        self._pack(layer)

    def edit_layers(
        self, targets: Sequence[Target], *of_targets: Sequence[Any]
    ) -> Iterator[tuple[Any, Tensor, list[tuple[Any, ...]]]]:
        """`edit` every layer of the targets once.

        Args:
            targets: as `find_targets` orders them.
            of_targets: sequences with one entry for each target.

        Yields:
            The layer, its weight (O, I), and its modules: tuples of a target and of its entries in `of_targets`.
        """
        # Once per layer, not once per module: `_pack` may pack the whole layer again after each edit. groupby joins
        # neighbours only, and `find_targets` puts the modules of a layer next to each other.
        modules = zip(targets, *of_targets, strict=True)
        for _, of_layer in itertools.groupby(modules, key=lambda module: id(module[0].module)):
            together = list(of_layer)
            layer = together[0][0].module.base_layer
            with self.edit(layer) as weight:
                yield layer, weight, together

    def restore(self) -> int:
        """Put every original back. Returns the number of layers that had been changed."""
        for layer, original in self._originals.values():
            self._put_back(layer, original)
        count = len(self._originals)
        self._originals.clear()
        return count

    # --- steps that a platform may override ---------------------------------------------------------------------------

    def _unpack(self, layer: Any, weight: Tensor) -> None:
        """Make `layer.weight` the plain (O, I) weight. `edit` calls this before a layer's first change."""

    def _pack(self, layer: Any) -> None:
        """Make the layer multiply with `layer.weight`. `edit` calls this after each change."""

    def _put_back(self, layer: Any, original: Tensor) -> None:
        """Make the layer multiply with `original`, (O, I), again."""
        # In place, because captured CUDA graphs know the weight by its address.
        layer.weight.data.copy_(original)
