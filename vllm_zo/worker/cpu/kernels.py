"""CPU kernels for a model's operators: vLLM's own for RMS norms and rotary embeddings, ours for gates.

An engine with LoRA compiles no model on a CPU. But vLLM chooses operators before it knows that, and takes those that a
compiler would fuse: an RMS norm is then seven torch operators, and the rotary embedding of a layer some twenty. On a
small model that is a tenth of the time between two tokens (docs/performance.md).

The gate of an MLP is three of torch's operators, and vLLM's kernel for it takes longer than those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm import ir
from vllm.config import CompilationMode
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.platforms import current_platform

from vllm_zo.worker.cpu import native

PROVIDER = "vllm_zo_cpu"
"""The name of these implementations in vLLM's lists of priorities."""
VECTOR = 16
"""vLLM's kernels take rows of whole vectors: 16 numbers are enough for every type and CPU."""


def choose_kernels(vllm_config: Any) -> None:
    """Let a model that is not compiled run vLLM's kernels, except where the user has chosen operators.

    A worker calls it before it makes its model.
    """
    if vllm_config.compilation_config.mode != CompilationMode.NONE:
        return
    if vllm_config.compilation_config.custom_ops == ["none"]:
        vllm_config.compilation_config.custom_ops[:] = ["all"]
    _register_gates()
    current_platform.import_kernels()  # they are not in `torch.ops` before
    priorities = vllm_config.kernel_config.ir_op_priority
    for name, register in (("rms_norm", _register_norm), ("fused_add_rms_norm", _register_add_norm)):
        if getattr(priorities, name) == ["native"]:
            if PROVIDER not in getattr(ir.ops, name).impls:
                register()
            setattr(priorities, name, [PROVIDER, "native"])


def _fits(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    one_type = weight is not None and weight.dtype == x.dtype
    return one_type and variance_size is None and x.is_contiguous() and x.shape[-1] % VECTOR == 0


@functools.cache  # vLLM takes a class once
def _register_gates() -> None:
    """Models that are made from now on compute their gates by our kernel."""
    if native.library() is None:
        return

    def through(x: Tensor, forward_native: Callable[[Tensor], Tensor], *, gelu: bool) -> Tensor:
        return native.gate(x, gelu=gelu) if x.is_contiguous() and native.fits(x) else forward_native(x)

    # `forward_cpu` runs where the operator is enabled, so in models that are not compiled.
    @SiluAndMul.register_oot
    class Silu(SiluAndMul):
        def forward_cpu(self, x: Tensor) -> Tensor:
            return through(x, self.forward_native, gelu=False)

    @GeluAndMul.register_oot
    class Gelu(GeluAndMul):
        def forward_cpu(self, x: Tensor) -> Tensor:
            return through(x, self.forward_native, gelu=True) if self.approximate == "tanh" else self.forward_native(x)


# vLLM wants the names, types and defaults of its own functions.


def _register_norm() -> None:
    def fits(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
        return _fits(x, weight, variance_size)

    @ir.ops.rms_norm.register_impl(PROVIDER, supports_args=fits)
    def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        normed = torch.empty_like(x)
        torch.ops._C.rms_norm(normed, x, weight, epsilon)
        return normed


def _register_add_norm() -> None:
    def fits(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> bool:
        alike = x_residual.dtype == x.dtype and x_residual.is_contiguous()
        return alike and _fits(x, weight, variance_size)

    @ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=fits, inplace=True)
    def fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual
