"""Causal attention on CPU for sequences that a single engine step computes from their first token to their last.

No later step continues such a sequence, so its keys and values need no KV cache: attention reads them where the layer
has just computed them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from vllm_zo.worker.cpu.linear import is_emulated
from vllm_zo.worker.cpu.row_plan import Buckets


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


def attend(layer: Any, query: Tensor, key: Tensor, value: Tensor, buckets: Buckets) -> Tensor:
    """Causal attention within each sequence.

    Args:
        layer: vLLM's attention layer, for its sizes, scale and sliding window.
        query: (U, heads * D); U counts the kept rows (`RowPlan`).
        key, value: (U, kv_heads * D).
        buckets: the sequences.

    Returns:
        (U, heads * D), contiguous.
    """
    heads, kv_heads, width = layer.num_heads, layer.num_kv_heads, layer.head_size
    sizes = [count * length for count, length in buckets.shapes]
    wide = is_emulated(query.dtype)  # then a product in 16 bits is several times slower than one in float32
    padded = [x.reshape(len(x), -1).index_select(0, buckets.gather_P) for x in (query, key, value)]
    parts = zip(buckets.shapes, *((x.float() if wide else x).split(sizes) for x in padded), strict=True)
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
    whole = attended[0] if len(attended) == 1 else torch.cat(attended)
    return whole.index_select(0, buckets.back_U).to(query.dtype)


def _window_mask(length: int, window: int) -> Tensor | None:
    """(length, length) bool: the keys that a query sees, itself and the `window - 1` before it. None: plain causal
    attention does it: there is no window (-1) or no sequence is longer."""
    if window == -1 or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
