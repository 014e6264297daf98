"""The one seam through which base weights are read and written: `read`, `edit`, `restore`, per platform.

On CPU the weight vLLM multiplies with may be a prepacked copy, and writing `layer.weight` then changes nothing at all
(the attribute is an empty tensor). Which packer a layer got is decided at load by
`vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm`; each is read back exactly and packed again here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.platforms import current_platform

from vllm_zo.errors import ConfigError
from vllm_zo.worker.kernels.cpu_linear import plain_linear


def check_writable(layer: Any, name: str) -> None:
    """Raise ConfigError for a layer whose weights cannot be folded into."""
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
    """Reads and changes the base weights of linear layers; keeps the originals of what it changed, on the host.

    From its first `edit` until `restore`, a layer that vLLM packs keeps its plain weight: to read one back by
    multiplication takes longer than a training step. In float32 it multiplies with that one, in 16 bits it is packed
    again after each `edit`.

    A layer here is vLLM's (possibly packed) `LinearBase`; its weight is (all slices' outputs, inputs) of this rank.
    """

    def __init__(self) -> None:
        self._originals: dict[int, tuple[Any, Tensor]] = {}

    def read(self, layer: Any) -> Tensor:
        """(O, I) copy of the weight that the layer multiplies with, in the model's dtype."""
        if layer.weight.numel():
            return layer.weight.detach().clone()
        return _unpack(layer)

    def original(self, layer: Any) -> Tensor:
        """(O, I) the weight as it was before the first change, in the model's dtype; not to be changed."""
        kept = self._originals.get(id(layer))
        return self.read(layer) if kept is None else kept[1]

    @contextmanager
    def edit(self, layer: Any) -> Iterator[Tensor]:
        """The (O, I) weight, to be changed in place; the layer multiplies with the result after the block.

        The original is kept the first time, for `restore`.
        """
        if id(layer) not in self._originals:
            original = self.read(layer)
            self._originals[id(layer)] = (layer, original.cpu())
            if not layer.weight.numel():
                layer.weight = torch.nn.Parameter(original.clone(), requires_grad=False)
        yield layer.weight.data
        if current_platform.is_cpu() and _is_packed(layer):
            if layer.weight.dtype == torch.float32:
                layer.cpu_linear = plain_linear
            else:
                utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)

    def restore(self) -> int:
        """Bring every original back; returns how many layers were changed."""
        for layer, original in self._originals.values():
            if current_platform.is_cpu():  # vLLM chooses the packer again, as at load
                layer.weight = torch.nn.Parameter(original, requires_grad=False)
                utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
            else:
                layer.weight.data.copy_(original)
        count = len(self._originals)
        self._originals.clear()
        return count


def _is_packed(layer: Any) -> bool:
    """Whether `cpu_linear` multiplies with a copy (oneDNN, AMX) rather than, or not always, with `layer.weight`."""
    return bool(_closure(layer).keys() & {"handler", "packed_weight", "zen_weight", "packed"})


def _closure(layer: Any) -> dict[str, Any]:
    function = layer.cpu_linear
    cells = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, (c.cell_contents for c in cells), strict=True))


def _unpack(layer: Any) -> Tensor:
    """Multiply by the identity: exact, because every product has a single non-zero term."""
    width = layer.input_size_per_partition
    dtype = layer.weight.dtype
    eye = torch.eye(width, dtype=dtype)
    return layer.cpu_linear(eye, None, None).T.contiguous()
