"""Causal attention on CPU for sequences that a single engine step computes from their first token to their last.

No later step continues such a sequence, so its keys and values need no KV cache: attention reads them where the layer
has just computed them. Our compiled kernel (`native.py`) takes the sequences as they are, torch's gets buckets.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from vllm_zo.worker.cpu import native
from vllm_zo.worker.cpu.linear import is_emulated
from vllm_zo.worker.cpu.row_plan import Unpadded, WholeSequences

SHORT = 128
"""Our kernel computes in float32. With 16-bit instructions torch's is faster where sequences are longer than this, by
its matrix products (measured with AMX at 64 to 256 numbers a head)."""


def why_not(layer: Any) -> str | None:
    """Names a feature of a vLLM attention layer that `attend` lacks; None if `attend` can replace the layer."""
    impl = layer.impl
    # The very class: a subclass may compute something else.
    if type(impl) is not CPUAttentionBackendImpl:
        return f"{type(impl).__name__} is not vLLM's CPU attention"
    extras = {
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        "a quantised KV cache": impl.is_fp8_kv_cache,
        "values of another size than keys": layer.head_size_v != layer.head_size,
    }
    return next((f"it has {name}" for name, present in extras.items() if present), None)


def attend(layer: Any, query: Tensor, key: Tensor, value: Tensor, whole: WholeSequences) -> Tensor:
    """Causal attention within each sequence.

    Args:
        layer: vLLM's attention layer, for its sizes, scale and sliding window.
        query: (U, heads * D); U counts the kept rows (`RowPlan`).
        key, value: (U, kv_heads * D).
        whole: the sequences.

    Returns:
        (U, heads * D), contiguous.
    """
    in_float32 = query.dtype == torch.float32 or is_emulated(query.dtype)
    if (in_float32 or whole.longest <= SHORT) and native.fits(query, key, value):
        return _attend_unpadded(layer, query, key, value, whole.unpadded)
    buckets = whole.buckets
    heads, kv_heads, width = layer.num_heads, layer.num_kv_heads, layer.head_size
    sizes = [count * length for count, length in buckets.shapes]
    padded = [x.reshape(len(x), -1).index_select(0, buckets.gather_P) for x in (query, key, value)]
    parts = zip(buckets.shapes, *((x.float() if in_float32 else x).split(sizes) for x in padded), strict=True)
    attended = []
    for (count, length), q, k, v in parts:
        q, k, v = (
            x.view(count, length, n, width).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))
        )
        mask = _window_mask(length, layer.impl.sliding_window)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=layer.impl.scale, enable_gqa=heads != kv_heads
        )
        attended.append(out.transpose(1, 2).reshape(count * length, heads * width))
    placed = attended[0] if len(attended) == 1 else torch.cat(attended)
    return placed.index_select(0, buckets.back_U).to(query.dtype)


def _attend_unpadded(layer: Any, query: Tensor, key: Tensor, value: Tensor, unpadded: Unpadded) -> Tensor:
    """`attend` by our kernel."""
    heads = native.Heads(
        layer.num_heads, layer.num_kv_heads, layer.head_size, layer.impl.sliding_window, layer.impl.scale
    )
    query, key, value = (x.reshape(len(x), -1) for x in (query, key, value))
    return native.attend(query, key, value, unpadded.starts, unpadded.rows_S, unpadded.first_S, heads)


def _window_mask(length: int, window: int) -> Tensor | None:
    """(length, length) bool: the keys that a query sees, itself and the `window - 1` before it. None: plain causal
    attention does it: there is no window (-1) or no sequence is longer."""
    if window == -1 or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
