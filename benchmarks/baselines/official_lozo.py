"""The official code's step. It perturbs the weights densely and in place, and scores every option as a padded sequence.

It follows optsuite/LOZO `large_models/LOZOtrainer.py` (`lowrank_zo_perturb_parameters`, `lowrank_zo_step`,
`lowrank_zo_update`) and princeton-nlp/MeZO `large_models/utils.py` (`forward_wrap_with_option_len`, the left-padding
collator) without copying them. It leaves out, all in its favour: the HF Trainer around it, the data loader, the
key-value cache that `use_cache=True` would fill, the weight-decay term (0 in the published runs, but computed), one of
the temporaries in the scaling of U V^T and, without `everything`, all parameters but the linear weights of the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.common import Step
from benchmarks.shapes import PAD


class OfficialLOZO(Step):
    """A step makes four dense sweeps over the weights: +eps, -2 eps, +eps, update. Each draws U again from its seed.

    Args:
        fused: run a sweep as one in-place `addmm_` instead of the official expression
            `param.data = param.data + factor * (u @ v.t())`, which makes temporaries as large as the weight.
        everything: perturb the rest of the model as well, as the released code does. Embeddings move along low-rank
            directions, biases and norms along dense ones.
    """

    def __init__(self, *args: Any, fused: bool = False, everything: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = "official-full" if everything else "official-addmm" if fused else "official"
        self.fused = fused
        self.v: tuple[Tensor, ...] = ()
        in_scope = {id(linear.weight) for linear in self.linears}
        self.rest = [p for p in self.model.parameters() if id(p) not in in_scope] if everything else []

    def _step(self, batch: list[list[int]], labels: Tensor) -> tuple[float, float]:
        if self.step_index % self.interval == 0 or not self.v:
            v = self.directions.v(self.step_index // self.interval)
            self.v = self.layout.split_v(v.to(self.dtype))
        inputs = self._option_sequences(batch)
        self._sweep(self.eps)
        plus = self._loss(*inputs, labels)
        self._sweep(-2 * self.eps)
        minus = self._loss(*inputs, labels)
        # Two sweeps where one would do: the official code restores the weights first, and then updates them.
        self._sweep(self.eps)
        self._sweep(-self.lr * self.coefficient(plus, minus))
        return plus, minus

    def _sweep(self, factor: float) -> None:
        """W += factor U V^T for every trained weight."""
        if not self.fused:
            for parameter, direction in self.perturbed():
                parameter.data = parameter.data + factor * direction
            return
        for linear, u, v in zip(self.linears, self._us(), self.v, strict=True):
            linear.weight.addmm_(u, v.T, alpha=factor)

    def _us(self) -> tuple[Tensor, ...]:
        return self.layout.split_u(self.directions.u(self.step_index).to(self.dtype))

    def perturbed(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every trained parameter with its direction of this step, one after another. All directions together would
        take as much memory as the model."""
        for linear, u, v in zip(self.linears, self._us(), self.v, strict=True):
            yield linear.weight, u @ v.T
        if not self.rest:
            return
        step = torch.Generator(self.device).manual_seed(7 + self.step_index)
        epoch = torch.Generator(self.device).manual_seed(-7 - self.step_index // self.interval)
        like: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        for parameter in self.rest:
            if parameter.ndim < 2:
                yield parameter, torch.randn(parameter.shape, generator=step, **like)
            else:
                u = torch.randn(len(parameter), self.rank, generator=step, **like)
                yield parameter, u @ torch.randn(self.rank, parameter.shape[1], generator=epoch, **like)

    def _option_sequences(self, batch: list[list[int]]) -> tuple[Tensor, Tensor]:
        """(2B, T) token ids and attention mask, left-padded. The two options of an example are next to each other."""
        width = max(map(len, batch)) + 1
        ids = torch.full((2 * len(batch), width), PAD)
        for i, prompt in enumerate(batch):
            for j, option in enumerate(self.options):
                ids[2 * i + j, width - len(prompt) - 1 :] = torch.tensor([*prompt, option])
        return ids.to(self.device), (ids != PAD).long().to(self.device)

    def _loss(self, ids: Tensor, mask: Tensor, labels: Tensor) -> float:
        """The mean cross-entropy over the options. As in the official code, it computes log-probabilities of the whole
        vocabulary at every position."""
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        log_probs = F.log_softmax(logits[:, :-1].contiguous(), dim=-1)
        targets = ids[:, 1:]
        of_tokens = torch.gather(log_probs, -1, targets.unsqueeze(-1)).squeeze(-1)
        scores = of_tokens[:, -1].view(-1, 2)  # an option is one token: the mean over its tokens is the last entry
        return F.cross_entropy(scores.float(), labels).item()

    def effective_weights(self) -> list[Tensor]:
        return [linear.weight.float().clone() for linear in self.linears]


class DenseMeZO(OfficialLOZO):
    """MeZO as released: the same step along a dense Gaussian direction of every parameter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = "dense-mezo"

    def perturbed(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator(self.device).manual_seed(7 + self.step_index)
        for parameter in self.model.parameters():
            yield parameter, torch.randn(parameter.shape, generator=generator, device=self.device, dtype=self.dtype)
