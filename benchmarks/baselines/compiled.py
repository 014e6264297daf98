"""The plain-PyTorch loop at its best on a GPU: packed tokens, compiled layers, one CUDA graph for each step.

It takes the step of `hand_packed.py` with all tensors at fixed addresses, so that CUDA can capture it. It pads the
tokens to `padded_size` (one graph for each such size), keeps both factor blocks of a GEMM in one matrix, and gives all
prompts of both signs to one call of FlashAttention. Losses, coefficient and update stay on the device. The host waits
once for each step, for the losses that it reports.

On a CPU it has neither graphs nor compilation, and masks its attention. That is for the tests.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.common import spans
from benchmarks.baselines.hand_packed import POSITION_OFFSET, HandPacked, OPTDecoder
from benchmarks.shapes import PAD
from vllm_zo.entrypoints.llm.cuda_graphs import padded_size

WARMUP = 3
"""Runs of a size before its capture. They compile, and let cuBLAS allocate its workspaces and choose its kernels."""

SiteTensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""W (O, I), its bias, A (I, kR) and B (O, 2kR) of a GEMM that stacks k weights."""


class Compiled(HandPacked):
    """See the module. If `prepare` has not seen the padded size of a batch, `_step` captures its graph."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, prepack=False, **kwargs)
        assert isinstance(self.decoder, OPTDecoder), "written for OPT only"
        self.name = "compiled"
        self.on_gpu = self.device != "cpu"
        if self.on_gpu and self.dtype == torch.float32:
            raise ValueError("dtype=float32: FlashAttention takes 16-bit types; use bfloat16 or float16")
        self.layer_step = torch.compile(layer_step) if self.on_gpu else layer_step
        self.u = torch.zeros_like(self.acc)
        self.graphs: dict[int, tuple[Any, Tensor]] = {}
        self.longest = 0
        self.labels: Tensor | None = None
        self._make_factors()

    def _make_factors(self) -> None:
        """Make fixed tensors for A and B, and the places in B for the entries of U_acc and of eps U.

        B of a GEMM that stacks weights 0 to k - 1 is (O, 2kR), [block diagonal of U_acc, block diagonal of eps U]. One
        product then adds the probes of all of them. The entries off the diagonal stay zero.
        """
        acc_places: list[Tensor] = []
        eps_places: list[Tensor] = []
        shapes: list[tuple[int, int]] = []
        rank, first = self.rank, 0
        for sites in self.layers:
            for site in sites.values():
                rows, k = len(site.weight), len(site.indices)
                places = torch.arange(first, first + rows * 2 * k * rank).view(k, rows // k, 2, k, rank)
                acc_places += [places[i, :, 0, i].reshape(-1) for i in range(k)]
                eps_places += [places[i, :, 1, i].reshape(-1) for i in range(k)]
                shapes.append((rows, 2 * k * rank))
                first += rows * 2 * k * rank
        self.acc_places, self.eps_places = (torch.cat(p).to(self.device) for p in (acc_places, eps_places))
        self.b_all = torch.zeros(first, dtype=self.dtype, device=self.device)
        parts = self.b_all.split([rows * columns for rows, columns in shapes])
        blocks = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        self.factors: list[dict[str, SiteTensors]] = []
        for sites in self.layers:
            self.factors.append({})
            for name, site in sites.items():
                a = site.weight.new_zeros(site.weight.shape[1], len(site.indices) * rank)
                self.factors[-1][name] = (site.weight, site.bias, a, next(blocks))

    def refresh(self, epoch: int) -> None:
        super().refresh(epoch)
        for shrinks, fixed in zip(self.shrinks, self.factors, strict=True):
            for name, shrink in shrinks.items():
                fixed[name][2].copy_(shrink)

    def prepare(self, batches: list[list[list[int]]]) -> int:
        """Capture a graph for every padded size, the largest first. The smaller ones then fit into its memory."""
        if not self.on_gpu:
            return 0
        self.longest = max(len(ids) for batch in batches for ids in batch)
        by_size = {self._size(batch): batch for batch in batches}
        with torch.inference_mode():
            for size in sorted(by_size, reverse=True):
                batch = by_size[size]
                self._load(batch, torch.zeros(len(batch), dtype=torch.int64, device=self.device))
                self._capture(size)
        return len(self.graphs)

    def _step(self, batch: list[list[int]], labels: Tensor) -> tuple[float, float]:
        if self.step_index % self.interval == 0 or not self.v:
            self.refresh(self.step_index // self.interval)
        if (longest := max(map(len, batch))) > self.longest:
            self.longest = longest
            self.graphs.clear()  # a graph holds the length of the longest prompt as a constant of FlashAttention
        self._load(batch, labels)
        size = self._size(batch)
        if self.on_gpu and size not in self.graphs:
            self._capture(size)
        self.u.copy_(self.directions.u(self.step_index))
        plus, minus = (self._replay(size) if self.on_gpu else self._body(size)).tolist()
        return plus, minus

    @staticmethod
    def _size(batch: list[list[int]]) -> int:
        return padded_size(2 * sum(map(len, batch)))

    def _load(self, batch: list[list[int]], labels: Tensor) -> None:
        """Write a batch to the fixed tensors: the token rows of +, those of -, padding."""
        where, tokens = spans(batch), sum(map(len, batch))
        padding = self._size(batch) - 2 * tokens
        ids = 2 * [token for prompt in batch for token in prompt] + [PAD] * padding
        positions = 2 * [i for start, end in where for i in range(end - start)] + [0] * padding
        ends = [end for _, end in where]
        ends += [tokens + end for end in ends]
        if self.labels is None:
            self._make_inputs(len(ends), labels)
        size = len(ids)
        self.ids[:size].copy_(torch.tensor(ids))
        self.positions_of[:size].copy_(torch.tensor(positions) + POSITION_OFFSET)
        self.sign[:tokens], self.sign[tokens : 2 * tokens] = 1, -1
        self.starts.copy_(torch.tensor([0, *ends], dtype=torch.int32))
        self.last.copy_(torch.tensor(ends) - 1)
        self.labels.copy_(labels)

    def _make_inputs(self, sequences: int, labels: Tensor) -> None:
        # As large as any batch could need: a captured graph holds the addresses, so the tensors cannot grow.
        most = padded_size(sequences * self.model.config.max_position_embeddings)
        self.ids = torch.zeros(most, dtype=torch.int64, device=self.device)
        self.positions_of = torch.zeros_like(self.ids)
        self.sign = torch.zeros(most, 1, dtype=self.dtype, device=self.device)
        self.starts = torch.zeros(sequences + 1, dtype=torch.int32, device=self.device)
        self.last = torch.zeros(sequences, dtype=torch.int64, device=self.device)
        self.labels = torch.zeros_like(labels)

    def _replay(self, size: int) -> Tensor:
        graph, losses = self.graphs[size]
        graph.replay()
        return losses

    def _capture(self, size: int) -> None:
        """Run a size WARMUP times, then capture it. The runs change nothing, because their U and so the update is 0."""
        self.u.zero_()
        # PyTorch's documentation asks for warm-up runs on a side stream before a capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                self._body(size)
        torch.cuda.current_stream().wait_stream(side)
        pool = next((graph.pool() for graph, _ in self.graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            losses = self._body(size)
        self.graphs[size] = graph, losses

    def _body(self, size: int) -> Tensor:
        """A whole step on the fixed tensors: factors, forward, losses, update. Returns (2,) L+ and L-."""
        assert self.labels is not None
        self.b_all.index_copy_(0, self.acc_places, self.acc.view(-1).to(self.dtype))
        self.b_all.index_copy_(0, self.eps_places, (self.eps * self.u).view(-1).to(self.dtype))
        decoder = self.decoder
        hidden = decoder.tokens[self.ids[:size]] + decoder.positions[self.positions_of[:size]]
        sign = self.sign[:size]
        for (norm, ffn_norm), sites in zip(decoder.norms, self.factors, strict=True):
            norms = (norm.weight, norm.bias, ffn_norm.weight, ffn_norm.bias)
            hidden = self.layer_step(
                hidden, sign, self.starts, self.longest, decoder.heads, norm.eps, norms, tuple(sites.values())
            )
        rows = hidden[self.last]
        final = decoder.final_norm
        losses = self.two_option_losses(
            F.layer_norm(rows, rows.shape[-1:], final.weight, final.bias, final.eps), self.labels
        )
        # Not `self.coefficient`, which takes Python numbers: the graph must not wait for the host.
        coefficient = (losses[0] - losses[1]) / (2 * self.eps)
        self.acc.sub_(self.lr * coefficient * self.u)
        return losses


def layer_step(
    x_TH: Tensor,
    sign_T1: Tensor,
    starts: Tensor,
    longest: int,
    heads: int,
    eps: float,
    norms: tuple[Tensor, Tensor, Tensor, Tensor],
    sites: tuple[SiteTensors, SiteTensors, SiteTensors, SiteTensors],
) -> Tensor:
    """One decoder layer under the probes. It has no `self`, so that torch compiles it once for all layers."""
    qkv, out, fc1, fc2 = sites
    width = x_TH.shape[-1:]
    normed = F.layer_norm(x_TH, width, norms[0], norms[1], eps)
    q, k, v = probed(normed, sign_T1, qkv).view(len(x_TH), 3, heads, -1).unbind(1)
    x_TH = x_TH + probed(attend(q, k, v, starts, longest).flatten(1), sign_T1, out)
    inner = probed(F.layer_norm(x_TH, width, norms[2], norms[3], eps), sign_T1, fc1).relu()
    return x_TH + probed(inner, sign_T1, fc2)


def probed(x_TI: Tensor, sign_T1: Tensor, site: SiteTensors) -> Tensor:
    """x W^T + bias + [s, sign s] B^T with s = x A. Both signs and all stacked weights share one shrink."""
    weight, bias, a, b = site
    s = x_TI @ a
    return torch.addmm(F.linear(x_TI, weight, bias), torch.cat([s, s * sign_T1], dim=1), b.T)


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Causal attention within each sequence. All tensors are (T, heads, head size).

    The token rows behind the last sequence are undefined.
    """
    if q.is_cuda:
        return torch.ops.aten._flash_attention_forward(q, k, v, starts, starts, longest, longest, 0.0, True, False)[0]
    rows = torch.arange(len(q))
    sequence = torch.bucketize(rows, starts[1:].long(), right=True)
    mask = (sequence[:, None] == sequence) & (rows[:, None] >= rows)
    per_head = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask)
    return per_head.transpose(0, 1)
