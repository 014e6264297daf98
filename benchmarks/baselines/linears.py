"""Ways to multiply by a constant weight on this machine, and how to find the fastest.

Each builder takes the (O, I) weight and (O,) bias (or None) and returns a function of (T, I). After a change of the
weight the caller builds it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
Builder = Callable[[Tensor, Tensor | None], Linear]
TYPICAL_TOKENS = 441
"""The mean tokens of a step of 16 prompts and 2 signs (shapes.py)."""
PART = 160
"""Rows: the count at which eight products of 576 to 3,072 features all came near their fastest with AMX."""


def plain(weight: Tensor, bias: Tensor | None) -> Linear:
    """torch's product, with the weight as torch keeps it."""
    return lambda x: F.linear(x, weight, bias)


def onednn(weight: Tensor, bias: Tensor | None) -> Linear:
    """vLLM's own CPU path: oneDNN, with the weight in the layout that its kernel wants."""
    import vllm._custom_ops as ops

    handler = ops.create_onednn_mm(weight.t(), 32)
    return lambda x: ops.onednn_mm(handler, x, bias)


def onednn_in_parts(weight: Tensor, bias: Tensor | None) -> Linear:
    """The same in parts of as many rows, a multiple of 16, the last of which overlap: at some row counts oneDNN gives
    all of a bfloat16 product to one thread, and it builds a kernel for each count it meets."""
    import vllm._custom_ops as ops

    handler = ops.create_onednn_mm(weight.t(), 32)

    def linear(x: Tensor) -> Tensor:
        rows = len(x)
        size = -(-rows // -(-rows // PART)) // -16 * -16
        if size >= rows:
            return ops.onednn_mm(handler, x, bias)
        y = x.new_empty(rows, len(weight))
        for start in range(0, rows, size):
            part = slice(min(start, rows - size), min(start + size, rows))
            torch.ops._C.onednn_mm(y[part], x[part], bias, handler.handler_tensor)
        return y

    return linear


def mkldnn(weight: Tensor, bias: Tensor | None) -> Linear:
    """torch's oneDNN path with a reordered weight, which TorchInductor uses."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_TOKENS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def float32(weight: Tensor, bias: Tensor | None) -> Linear:
    """A product with a float32 copy of a 16-bit weight. It is far faster on machines without 16-bit matrix
    instructions."""
    wide, wide_bias = weight.float(), None if bias is None else bias.float()
    return lambda x: F.linear(x.float(), wide, wide_bias).to(x.dtype)


PREPACKED: dict[str, Builder] = {
    "onednn": onednn,
    "onednn in parts": onednn_in_parts,
    "mkldnn": mkldnn,
    "float32": float32,
}


def seconds(linear: Linear, x: Tensor, repeats: int = 7) -> float:
    """The seconds of the fastest of a few calls, which other programs disturb least. One more call warms up."""
    linear(x)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        linear(x)
        taken.append(time.perf_counter() - start)
    return min(taken)


def fastest(weight: Tensor, bias: Tensor | None) -> tuple[str, dict[str, float]]:
    """The name of the fastest kind for this weight, and the milliseconds of all kinds that work here."""
    x = torch.randn(TYPICAL_TOKENS, weight.shape[1]).to(weight.dtype)
    times = {"plain": seconds(plain(weight, bias), x)}
    for name, build in PREPACKED.items():
        if name == "float32" and weight.dtype == torch.float32:
            continue
        try:
            times[name] = seconds(build(weight, bias), x)
        except (RuntimeError, AttributeError, ImportError):
            continue  # needs instructions or a vLLM build that this machine does not have
    return min(times, key=lambda name: times[name]), {name: round(1e3 * t, 3) for name, t in times.items()}


def build(name: str, weight: Tensor, bias: Tensor | None) -> Linear:
    return plain(weight, bias) if name == "plain" else PREPACKED[name](weight, bias)
