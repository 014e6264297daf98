"""LoZO as one would write it down, on a stock Hugging Face model: what convergence.py compares ours with.

Every probe writes the dense weights `W +/- eps U V^T`, prompts are padded and masked, the update is added to W at every
step. No slots, no factored accumulators, no fold: in exact arithmetic `W += U_acc V^T` at the end of an interval, the
sum over the bases of a bank, and adding each step at once are the same thing, and only the choice of V tells the two
update spaces apart. Taken from vllm_zo: the seeds and noise that make U and V, and the order of the batches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_zo import LoZO, noise
from vllm_zo.methods.base import ModuleShape
from vllm_zo.methods.state import BASIS_STREAM, FactorLayout

IN_A_LAYER = re.compile(r"\.layers\.\d+\.")
EVALUATION_BATCH = 50


class PlainTrainer:
    """Owns the model and its optimiser steps.

    Args:
        model_dir: Hugging Face checkpoint of a causal LM.
        template, options: prompt with a {sentence} placeholder; answers of a single token each.
        seed: of the directions, as in a vllm_zo job.
        num_bases: how many V return in turn; None draws a new one at every refresh (`fold`).
        dtype: of weights, forward passes and losses.
    """

    def __init__(
        self,
        model_dir: str | Path,
        template: str,
        options: Sequence[str],
        method: LoZO,
        learning_rate: float,
        seed: int,
        num_bases: int | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="right")
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval().requires_grad_(False)
        self.template, self.method, self.seed, self.num_bases = template, method, seed, num_bases
        self.learning_rate = learning_rate
        self.options = [self._single_token(option) for option in options]
        modules = self.model.named_modules()
        linears = {name: m for name, m in modules if isinstance(m, nn.Linear) and IN_A_LAYER.search(name)}
        self.weights: list[Tensor] = [m.weight.data for m in linears.values()]
        self.saved = [weight.clone() for weight in self.weights]
        """The state; `weights`, which the model multiplies with, are this or a probe around it."""
        shapes = tuple(ModuleShape(name, m.out_features, m.in_features) for name, m in linears.items())
        self.layout = FactorLayout(shapes, method.rank)
        self._v: tuple[int, list[Tensor]] | None = None

    def _single_token(self, option: str) -> int:
        ids = self.tokenizer(option, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise SystemExit(f"option {option!r} has {len(ids)} tokens; the plain trainer scores single tokens only")
        return int(ids[0])

    def step(self, step: int, rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
        """Both probes and the update; returns mean loss (nats) and accuracy of the two."""
        epoch = self.method.epoch(step)
        basis = epoch if self.num_bases is None else epoch % self.num_bases
        probe = self.method.plan(self.seed, step, basis).probes[0]
        us = [u.to(self.saved[0]) for u in self.layout.split_u(noise.normal(probe.seed, self.layout.u_ranges, "cpu"))]
        vs = self._right_factors(basis)
        scores = []
        for sign in (1, -1):
            self._set_weights(us, vs, sign * self.method.eps)
            scores.append(self.score(rows))
        (plus, right_plus), (minus, right_minus) = [(losses.mean().item(), hits) for losses, hits in scores]
        projected_grad = (plus - minus) / (2 * self.method.eps)
        self._set_weights(us, vs, -self.learning_rate * projected_grad)
        for saved, weight in zip(self.saved, self.weights, strict=True):
            saved.copy_(weight)
        return (plus + minus) / 2, (right_plus + right_minus) / (2 * len(rows))

    def _right_factors(self, basis: int) -> list[Tensor]:
        if self._v is None or self._v[0] != basis:
            flat = noise.normal(noise.derive_key(self.seed, BASIS_STREAM, basis), self.layout.v_ranges, "cpu")
            self._v = basis, [v.to(self.saved[0]) for v in self.layout.split_v(flat)]
        return self._v[1]

    def _set_weights(self, us: list[Tensor], vs: list[Tensor], factor: float) -> None:
        """weights = saved + factor U V^T. From the saved state every time: adding and subtracting would drift."""
        for weight, saved, u, v in zip(self.weights, self.saved, us, vs, strict=True):
            torch.addmm(saved, u, v.T, alpha=factor, out=weight)

    @torch.inference_mode()
    def score(self, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, int]:
        """(rows,) cross-entropies over the options in nats, and how many rows are answered right."""
        texts = [self.template.format(sentence=row["sentence"].strip()) for row in rows]
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        hidden = self.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        last = hidden[torch.arange(len(rows)), batch.attention_mask.sum(dim=1) - 1]
        logits = self.model.lm_head(last)[:, self.options]
        labels = torch.tensor([row["label"] for row in rows])
        return F.cross_entropy(logits, labels, reduction="none"), int((logits.argmax(dim=1) == labels).sum())

    def evaluate(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Mean loss and accuracy at the current weights."""
        parts = [self.score(rows[i : i + EVALUATION_BATCH]) for i in range(0, len(rows), EVALUATION_BATCH)]
        total = sum(losses.sum().item() for losses, _ in parts)
        return {"loss": total / len(rows), "accuracy": sum(hits for _, hits in parts) / len(rows)}
