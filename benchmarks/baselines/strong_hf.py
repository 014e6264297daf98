"""What a good user of Hugging Face writes: the stock model, low-rank probes in hooks, no work that the loss cannot see.

Both signs go into one batch of prompts (no option sequences), the LM head computes two logits at the last position, and
weights change only when V does. Padding is on the right and there is no attention mask: with causal attention a real
token never sees the padding behind it, positions count from 0 as they should, and the attention kernel may use its
causal path. The losses are the same as with a mask (a test compares unpadded sequences), in less time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.common import LazyStep
from benchmarks.shapes import PAD


class StrongHF(LazyStep):
    name = "strong"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for index, linear in enumerate(self.linears):
            linear.register_forward_hook(self._hook(index))

    def _hook(self, index: int) -> Any:
        def add_probe(linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            """output += [s, sign s] [U_acc, eps U]^T; the + half of the batch comes first."""
            s_TR = inputs[0].flatten(0, -2) @ self.v[index]
            signed_TR = torch.cat([s_TR[: len(s_TR) // 2], -s_TR[len(s_TR) // 2 :]])
            output.view(-1, output.shape[-1]).addmm_(torch.cat([s_TR, signed_TR], dim=1), self.b[index].T)

        return add_probe

    def score(self, batch: list[list[int]], labels: Tensor) -> Tensor:
        lengths = torch.tensor([len(ids) for ids in batch])
        width = int(lengths.max())
        padded = torch.tensor([ids + [PAD] * (width - len(ids)) for ids in batch], device=self.device)
        hidden = self.model.model(input_ids=padded.repeat(2, 1), use_cache=False).last_hidden_state
        last = lengths.repeat(2).to(self.device) - 1
        last_hidden = hidden[torch.arange(len(hidden), device=self.device), last]
        return self.two_option_losses(last_hidden, labels)
