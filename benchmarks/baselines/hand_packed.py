"""LoZO rewritten for one model: the loop that a strong engineer ends up with for this model and nothing else.

The tokens of all prompts and both signs lie one after another without padding. q, k and v are one GEMM, and both signs
share every shrink. Attention runs for each prompt on views, with both signs in one call, and copies nothing to a padded
buffer. The LM head computes two logits at the last tokens. When V changes, it folds and packs the weights again.

The loop is the same for OPT and Llama. `OPTDecoder` here and `LlamaDecoder` next door compute what differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import linears
from benchmarks.baselines.common import LazyStep, attend_within, spans
from benchmarks.baselines.hand_packed_llama import LlamaDecoder

POSITION_OFFSET = 2  # OPT's position table starts with two unused rows


@dataclass
class Site:
    """One GEMM: a weight (O, I) with its bias, the indices and out features of the weights that it stacks, and how to
    multiply by it."""

    weight: Tensor
    bias: Tensor | None
    indices: tuple[int, ...]
    out_features: list[int]
    kind: str
    linear: linears.Linear


class Decoder(Protocol):
    """What the loop asks of a model, besides its linear weights. Rows are tokens: those of +, then those of -."""

    SITES: ClassVar[dict[str, tuple[int, ...]]]
    """The four GEMMs of a layer, in the order of the loop -> which of its weights each stacks (in the order of
    `Shape.linears`)."""
    norms: list[tuple[Any, Any]]
    """For each layer the norm before attention and the norm before the MLP."""
    final_norm: Any

    def embed(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """(2T, H) from the T tokens of one sign. It begins a forward: `attend` uses what it keeps of the positions."""
        ...

    def norm(self, x: Tensor, norm: Any) -> Tensor: ...

    def attend(self, qkv: Tensor, where: list[tuple[int, int]]) -> Tensor:
        """Causal attention within each prompt, for both signs at once: (2T, O of qkv) -> (2T, H)."""
        ...

    def activate(self, inner: Tensor) -> Tensor:
        """The function between the two GEMMs of the MLP. It may overwrite its input."""
        ...


class OPTDecoder:
    SITES: ClassVar[dict[str, tuple[int, ...]]] = {"qkv": (0, 1, 2), "out": (3,), "fc1": (4,), "fc2": (5,)}

    def __init__(self, model: Any) -> None:
        decoder = model.model.decoder
        self.tokens, self.positions = decoder.embed_tokens.weight, decoder.embed_positions.weight
        self.heads, self.final_norm = model.config.num_attention_heads, decoder.final_layer_norm
        self.norms = [(layer.self_attn_layer_norm, layer.final_layer_norm) for layer in decoder.layers]

    def embed(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        return (self.tokens[ids_T] + self.positions[positions_T + POSITION_OFFSET]).repeat(2, 1)

    def norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def attend(self, qkv: Tensor, where: list[tuple[int, int]]) -> Tensor:
        q, k, v = qkv.view(2, len(qkv) // 2, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return attend_within(where, q, k, v)

    def activate(self, inner: Tensor) -> Tensor:
        return inner.relu_()


class HandPacked(LazyStep):
    """See the module. With `prepack` it holds each weight twice: one to fold into, one to multiply with.

    Args:
        prepack: multiply with the fastest prepacked form of each weight instead of torch's own.
        prune_last_layer: compute only the last tokens behind the last attention. The loss sees nothing else. No general
            engine does this, so it is a variant of its own.
    """

    def __init__(self, *args: Any, prepack: bool = True, prune_last_layer: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = "packed-pruned" if prune_last_layer else "packed-prepacked" if prepack else "packed"
        self.prune_last_layer = prune_last_layer
        self.kinds: dict[str, Any] = {}
        self.decoder: Decoder = (LlamaDecoder if self.shape.is_llama else OPTDecoder)(self.model)
        self.layers = [self._sites(number, prepack) for number in range(self.shape.layers)]

    def _sites(self, layer: int, prepack: bool) -> dict[str, Site]:
        """Stack the weights of a layer; the model's own copies become views of the stacks."""
        sites = {}
        for site_name, of_layer in self.decoder.SITES.items():
            indices = tuple(len(self.shape.linears) * layer + i for i in of_layer)
            parts = [self.linears[i] for i in indices]
            weight = torch.cat([p.weight for p in parts])
            bias = None if parts[0].bias is None else torch.cat([p.bias for p in parts])
            out_features = [p.out_features for p in parts]
            # Views, so that `fold` into `linears` changes the stacked weight too.
            for part, rows in zip(parts, weight.split(out_features), strict=True):
                part.weight.data = rows
            if site_name not in self.kinds:  # every layer has the same shapes, so one choice serves all
                self.kinds[site_name] = linears.fastest(weight, bias) if prepack else ("plain", {})
            kind = self.kinds[site_name][0]
            sites[site_name] = Site(weight, bias, indices, out_features, kind, linears.build(kind, weight, bias))
        return sites

    @property
    def details(self) -> dict[str, Any]:
        return {"linears": {site: {"kind": kind, "ms": ms} for site, (kind, ms) in self.kinds.items()}}

    def repack(self) -> None:
        for sites in self.layers:
            for site in sites.values():
                site.linear = linears.build(site.kind, site.weight, site.bias)

    def refresh(self, epoch: int) -> None:
        super().refresh(epoch)
        self.shrinks = [
            {name: torch.cat([self.v[i] for i in site.indices], dim=1) for name, site in sites.items()}
            for sites in self.layers
        ]

    def score(self, batch: list[list[int]], labels: Tensor) -> Tensor:
        where = spans(batch)
        ids = torch.tensor([token for prompt in batch for token in prompt], device=self.device)
        positions = torch.cat([torch.arange(end - start) for start, end in where]).to(self.device)
        decoder = self.decoder
        qkv, out, up, down = decoder.SITES
        hidden = decoder.embed(ids, positions)
        sign = torch.ones(2 * len(ids), 1, dtype=self.dtype, device=self.device)
        sign[len(ids) :] = -1
        last = torch.tensor([end - 1 for _, end in where], device=self.device)
        last = torch.cat([last, last + len(ids)])
        for layer, (norm, ffn_norm) in enumerate(decoder.norms):
            attended = decoder.attend(self._apply(layer, qkv, decoder.norm(hidden, norm), sign), where)
            if self.prune_last_layer and layer == len(decoder.norms) - 1:
                attended, hidden, sign = attended[last], hidden[last], sign[last]
                last = torch.arange(len(last), device=self.device)
            hidden += self._apply(layer, out, attended, sign)
            inner = decoder.activate(self._apply(layer, up, decoder.norm(hidden, ffn_norm), sign))
            hidden += self._apply(layer, down, inner, sign)
        return self.two_option_losses(decoder.norm(hidden[last], decoder.final_norm), labels)

    def _apply(self, layer: int, name: str, x_TI: Tensor, sign_T1: Tensor) -> Tensor:
        """A linear and its probe: one shrink for all stacked weights and both signs, one expand for each weight."""
        site = self.layers[layer][name]
        y_TO = site.linear(x_TI)
        s = x_TI @ self.shrinks[layer][name]
        for i, s_TR, out in zip(site.indices, s.split(self.rank, 1), y_TO.split(site.out_features, 1), strict=True):
            out.addmm_(torch.cat([s_TR, s_TR * sign_T1], dim=1), self.b[i].T)
        return y_TO
