"""The oracle of the engine tests: the same Method, Objective and fold on a plain Hugging Face model, without vLLM.

Naive on purpose: every probe writes dense weights, every row is its own forward pass, nothing is padded or packed.

    trainer = ReferenceTrainer(model, LoZO(), objective, job_seed=0, update_space="bank", num_bases=7)
    losses_PE, coefficients_K = trainer.step(step, examples, learning_rate)
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vllm_zo import noise
from vllm_zo.methods.base import Method
from vllm_zo.methods.fold import fold_into
from vllm_zo.methods.plan import ModuleShape, ProbePlan
from vllm_zo.methods.spaces import basis_of
from vllm_zo.methods.state import AdapterState
from vllm_zo.methods.targets import select_modules
from vllm_zo.objectives.base import EncodedExample, Objective, ScoringSequence

DECODER_LAYER = re.compile(r"(^|.*\.)(layers|h|blocks)\.\d+\..+")


def trainable(model: nn.Module) -> dict[str, nn.Module]:
    """By Hugging Face name: linear modules inside decoder layers, the LM head, and of a Llama the embeddings."""
    others = ("lm_head", *(["model.embed_tokens"] if model.config.model_type == "llama" else []))
    return {
        name: module
        for name, module in model.named_modules()
        if name in others or (isinstance(module, nn.Linear) and DECODER_LAYER.fullmatch(name))
    }


def weight_of(module: nn.Module) -> Tensor:
    """(out, in) view of the weight; an embedding has one-hot inputs."""
    return module.weight.T if isinstance(module, nn.Embedding) else module.weight


def change_of(u: Tensor, v_IR: Tensor | None) -> Tensor:
    """(O, I) float64 `u v^T`; `u` itself where there is no v."""
    return u.double() if v_IR is None else u.double() @ v_IR.double().T


class ReferenceTrainer:
    """Trains a copy of `model`, one step at a time.

    Args:
        model: causal LM; its dtype is the one weights are stored, and folded, in.
        num_bases: M as `resolve_bases` gives it; 1 in `fold` space.
        target_modules, target_layers: as in JobConfig.
        dtype: of forward passes and losses, float32 or float64. Weights are summed in float64, then cast to it.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        objective: Objective,
        *,
        job_seed: int,
        update_space: str,
        num_bases: int = 1,
        target_modules: str = "all-linear",
        target_layers: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        modules = trainable(model)
        self.names = select_modules(target_modules, modules, target_layers)
        self.base = {name: weight_of(modules[name]).detach().clone() for name in self.names}
        self.model = copy.deepcopy(model).to(dtype).eval()
        self.modules = trainable(self.model)
        if (head := self.modules.get("lm_head")) is not None:  # a change of it leaves tied embeddings alone
            head.weight = nn.Parameter(head.weight.detach().clone())
        self.method, self.objective, self.space = method, objective, update_space
        self.job_seed, self.num_bases = job_seed, num_bases
        shapes = tuple(ModuleShape(name, *weight.shape) for name, weight in self.base.items())
        self.layout = method.layout(shapes)
        self.state = AdapterState(method, self.layout, job_seed, num_bases)
        self.basis = 0
        """Basis of the last step; in `fold` space the only one with an accumulator."""

    def step(
        self,
        step: int,
        examples: Sequence[EncodedExample],
        learning_rate: float,
        eps_factor: float = 1.0,
        max_coefficient: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One optimiser step.

        Returns:
            (P, E) losses in nats, in the objective's dtype; and the (K,) float32 coefficients applied, which are zeros
            when a loss is not finite.
        """
        basis = basis_of(self.method, step, self.space, self.num_bases)
        if self.space == "fold" and basis != self.basis:
            self.fold(key=noise.derive_key(self.job_seed, "fold", step))
        self.basis = basis
        plan = self.method.plan(self.job_seed, step, basis).scaled(eps_factor)
        losses_PE = self.score_probes(examples, plan)
        coefficients_K = self.method.coefficients(plan, losses_PE).float()
        if max_coefficient is not None:
            coefficients_K = coefficients_K.clamp(-max_coefficient, max_coefficient)
        finite = bool(losses_PE.isfinite().all())
        if not finite:
            coefficients_K = torch.zeros_like(coefficients_K)
        self.state.apply(plan, coefficients_K, learning_rate, finite)
        return losses_PE, coefficients_K

    def score_probes(self, examples: Sequence[EncodedExample], plan: ProbePlan) -> Tensor:
        """(P, E) losses."""
        offsets = [self.state.offset(plan, i) if p.sign else None for i, p in enumerate(plan.probes)]
        return torch.cat([self.score(examples, offset)[0] for offset in offsets])

    def fold(self, key: int) -> None:
        """Write the accumulator into the stored weights and forget it."""
        taken = self.state.take()
        if taken is None:
            return
        basis, acc_N = taken
        for name, u_OR, v_IR in zip(self.names, *self.state.factors(basis, acc_N), strict=True):
            self.base[name] = fold_into(self.base[name], u_OR, v_IR, key, name)

    def weights(self, offset_N: Tensor | None = None) -> dict[str, Tensor]:
        """Dense float64 weights by module: base + sum over bases of U V^T, the current one at a probe's offset."""
        total = {name: weight.double() for name, weight in self.base.items()}
        for basis in [self.basis] if self.space == "fold" else range(self.num_bases):
            theta_N = self.state.accumulator(basis).double()
            if offset_N is not None and basis == self.basis:
                theta_N = theta_N + offset_N
            for name, u_OR, v_IR in zip(self.names, *self.state.factors(basis, theta_N), strict=True):
                total[name] = total[name] + change_of(u_OR, v_IR)
        return total

    @torch.no_grad()
    def score(self, examples: Sequence[EncodedExample], offset_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(1, E) losses in nats and (1, E) predictions at the current weights, or at a probe's."""
        for name, weight in self.weights(offset_N).items():
            weight_of(self.modules[name]).copy_(weight)
        cells = [self._cells(row) for example in examples for row in example.sequences]
        return self.objective.loss(torch.cat(cells)[None], examples)

    def _cells(self, row: ScoringSequence) -> Tensor:
        """Scores of one row, from a forward pass over it alone; see `vllm_zo.objectives.base`."""
        logits_TV = self.model(torch.tensor([row.token_ids])).logits[0]
        labels = torch.tensor(row.label_ids)
        if row.kind == "labels":
            return logits_TV[row.positions[0], labels]
        log_probs_TV = logits_TV[torch.tensor(row.positions)].log_softmax(-1)
        return torch.cat([log_probs_TV[torch.arange(len(labels)), labels], log_probs_TV.amax(-1)])
