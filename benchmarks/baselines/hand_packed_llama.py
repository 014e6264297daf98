"""What `hand_packed.py` computes of a Llama, besides its linear weights: embeddings, norms, attention and activation.

gate and up are one GEMM, as q, k and v are. The rotary embedding turns q and k together, on the packed rows. Attention
lets `scaled_dot_product_attention` share the keys and values of a group of heads. Nothing was faster: neither copies of
keys and values for every head, nor views of them in a call for each sign, nor a rotation by halves or in place.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.common import attend_within


class LlamaDecoder:
    """A `hand_packed.Decoder`."""

    SITES: ClassVar[dict[str, tuple[int, ...]]] = {"qkv": (0, 1, 2), "out": (3,), "gate_up": (4, 5), "down": (6,)}

    def __init__(self, model: Any) -> None:
        decoder, config = model.model, model.config
        self.tokens, self.final_norm = decoder.embed_tokens.weight, decoder.norm
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.norms = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in decoder.layers]
        positions = torch.arange(config.max_position_embeddings, device=self.tokens.device)
        cos, sin = decoder.rotary_emb(self.tokens, positions[None])  # (1, positions, head size)
        half = sin.shape[-1] // 2
        self.cos = cos[0]
        # A rotation is x cos + swapped x sin, where the first half of `swapped` has the other sign. It is in here.
        self.sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=1)

    def embed(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        # (2T, 1, head size): the same for all layers and heads.
        self.cos_now, self.sin_now = (table[positions_T].repeat(2, 1)[:, None] for table in (self.cos, self.sin))
        return self.tokens[ids_T].repeat(2, 1)

    def norm(self, x: Tensor, norm: Any) -> Tensor:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    def attend(self, qkv: Tensor, where: list[tuple[int, int]]) -> Tensor:
        rows = qkv.view(len(qkv), self.heads + 2 * self.kv_heads, -1)
        turned = self._rotate(rows[:, : self.heads + self.kv_heads])
        q, k, v = (
            part.unflatten(0, (2, -1)).transpose(1, 2)  # (2, heads, T, head size), a view
            for part in (turned[:, : self.heads], turned[:, self.heads :], rows[:, -self.kv_heads :])
        )
        return attend_within(where, q, k, v)

    def _rotate(self, x: Tensor) -> Tensor:
        """Turn (2T, heads, head size) by the positions of the rows."""
        return (x * self.cos_now).addcmul_(x.roll(x.shape[-1] // 2, -1), self.sin_now)

    def activate(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, dim=1)
        return F.silu(gate).mul_(up)
