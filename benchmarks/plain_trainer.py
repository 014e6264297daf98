"""LoZO in its plainest form on a stock Hugging Face model. convergence.py compares ours with it.

Every probe writes the dense weights `W +/- eps U V^T`, the prompts are padded and masked, and every step adds its
update to W. There are no slots, no factored accumulators and no fold. In exact arithmetic that is the same as adding
`U_acc V^T` at the end of an interval, or as the sum over the bases of a bank. Only the choice of V tells the two update
spaces apart. The trainer takes two things from vllm_zo: the seeds and noise of U and V, and the order of the batches.
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
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.methods.plan import ModuleShape
from vllm_zo.methods.state import BASIS_STREAM

IN_A_LAYER = re.compile(r"\.layers\.\d+\.")
EVALUATION_BATCH = 50


class PlainTrainer:
    """It owns the model and takes the steps.

    Args:
        model_dir: Hugging Face checkpoint of a causal LM.
        template, options: a prompt with a {sentence} placeholder, and answers of a single token each.
        seed: seed of the directions, as in a vllm_zo job.
        num_bases: how many V return in turn; None draws a new one at every refresh (`fold`).
        dtype: dtype of weights, forward passes and losses.
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
        """The state. The model multiplies with `weights`, which hold the state or a probe around it."""
        shapes = tuple(ModuleShape(name, m.out_features, m.in_features) for name, m in linears.items())
        self.layout = FactorLayout(shapes, method.rank)
        self._v: tuple[int, list[Tensor]] | None = None

    def _single_token(self, option: str) -> int:
        ids = self.tokenizer(option, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise SystemExit(f"option {option!r} has {len(ids)} tokens; the plain trainer scores single tokens only")
        return int(ids[0])

    def step(self, step: int, records: Sequence[dict[str, Any]]) -> tuple[float, float]:
        """Score both probes and update. Returns the mean loss (nats) and the accuracy of the two."""
        epoch = self.method.epoch(step)
        basis = epoch if self.num_bases is None else epoch % self.num_bases
        probe = self.method.plan(self.seed, step, basis).probes[0]
        us = [u.to(self.saved[0]) for u in self.layout.split_u(noise.normal(probe.key, self.layout.u_ranges, "cpu"))]
        vs = self._right_factors(basis)
        scores = []
        for sign in (1, -1):
            self._set_weights(us, vs, sign * self.method.eps)
            scores.append(self.score(records))
        (plus, right_plus), (minus, right_minus) = [(losses.mean().item(), hits) for losses, hits in scores]
        projected_grad = (plus - minus) / (2 * self.method.eps)
        self._set_weights(us, vs, -self.learning_rate * projected_grad)
        for saved, weight in zip(self.saved, self.weights, strict=True):
            saved.copy_(weight)
        return (plus + minus) / 2, (right_plus + right_minus) / (2 * len(records))

    def _right_factors(self, basis: int) -> list[Tensor]:
        if self._v is None or self._v[0] != basis:
            flat = noise.normal(noise.derive_key(self.seed, BASIS_STREAM, basis), self.layout.v_ranges, "cpu")
            self._v = basis, [v.to(self.saved[0]) for v in self.layout.split_v(flat)]
        return self._v[1]

    def _set_weights(self, us: list[Tensor], vs: list[Tensor], factor: float) -> None:
        """weights = saved + factor U V^T. It starts from `saved`, because adding and subtracting would drift."""
        for weight, saved, u, v in zip(self.weights, self.saved, us, vs, strict=True):
            torch.addmm(saved, u, v.T, alpha=factor, out=weight)

    @torch.inference_mode()
    def score(self, records: Sequence[dict[str, Any]]) -> tuple[Tensor, int]:
        """(examples,) cross-entropies over the options in nats, and the number of right answers."""
        texts = [self.template.format(sentence=record["sentence"].strip()) for record in records]
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        hidden = self.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        # Padding is on the right, so the last real token of a prompt is at its length minus 1.
        last = hidden[torch.arange(len(records)), batch.attention_mask.sum(dim=1) - 1]
        logits = self.model.lm_head(last)[:, self.options]
        labels = torch.tensor([record["label"] for record in records])
        return F.cross_entropy(logits, labels, reduction="none"), int((logits.argmax(dim=1) == labels).sum())

    def evaluate(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The mean loss (nats) and the accuracy at the current weights."""
        parts = [self.score(records[i : i + EVALUATION_BATCH]) for i in range(0, len(records), EVALUATION_BATCH)]
        total = sum(losses.sum().item() for losses, _ in parts)
        return {"loss": total / len(records), "accuracy": sum(hits for _, hits in parts) / len(records)}
