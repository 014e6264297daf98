"""Base weights of a CPU engine, whose layers may multiply with a packed copy.

`layer.weight` of such a layer is an empty tensor, and writing to it changes no product. vLLM chooses a layer's packer
at load, in `vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm`. This module reads each packed weight back
exactly, and packs it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers import utils

from vllm_zo.worker.base_weights import BaseWeights
from vllm_zo.worker.cpu.fused_linear import FusedLinear
from vllm_zo.worker.cpu.plain_linear import plain_linear

PACKED = {"handler", "packed_weight", "zen_weight"}
"""Variables that hold a packed copy in the closures that vLLM sets as `cpu_linear` (oneDNN, AMX, zentorch). vLLM has no
other sign that a layer is packed; `vllm-zo doctor` checks the names (`compat/seams.py`)."""


class PackedWeights(BaseWeights):
    """`BaseWeights` for layers that vLLM packs.

    From its first `edit` until `restore` such a layer keeps its plain weight, because reading a packed one back takes
    longer than a training step. A float32 layer then multiplies with the plain weight; a 16-bit layer is packed again
    after each `edit`.
    """

    def read(self, layer: Any) -> Tensor:
        """See `BaseWeights`."""
        if layer.weight.numel():
            return super().read(layer)
        product = layer.cpu_linear
        return product.weight() if isinstance(product, FusedLinear) else _multiplied_out(layer)

    def _unpack(self, layer: Any, weight: Tensor) -> None:
        if not layer.weight.numel():
            layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)

    def _pack(self, layer: Any) -> None:
        # A layer without a packed copy reads `layer.weight` at every call: there is nothing to do.
        if not _is_packed(layer.cpu_linear):
            return
        if layer.weight.dtype == torch.float32:
            layer.cpu_linear = plain_linear()
        else:
            utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)

    def _put_back(self, layer: Any, original: Tensor) -> None:
        """See `BaseWeights`. vLLM chooses the packer again, as at load, and removes the plain weight."""
        layer.weight = torch.nn.Parameter(original, requires_grad=False)
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)


def _is_packed(product: Any) -> bool:
    """Whether this `cpu_linear` multiplies with a packed copy: ours, or a closure of vLLM's that holds one."""
    names = product.__code__.co_freevars if getattr(product, "__closure__", None) else ()
    return isinstance(product, FusedLinear) or not PACKED.isdisjoint(names)


def _multiplied_out(layer: Any) -> Tensor:
    """(O, I): the packed weight times the identity. This is exact, because each sum has a single non-zero term."""
    eye = torch.eye(layer.input_size_per_partition, dtype=layer.weight.dtype)
    weight: Tensor = layer.cpu_linear(eye, None, None).T.contiguous()
    return weight
