"""What the baselines share: the weights in scope, where directions come from, the loss, and the lazy low-rank step.

Shape suffixes: O out features, I in features, R rank, B examples, T tokens, H hidden. The rule all of them follow, per
step and linear weight W, with V drawn every `interval` steps and U every step (LoZO, arXiv:2410.07698, Algorithm 1):

    c = (L(W + eps U V^T) - L(W - eps U V^T)) / (2 eps),    W <- W - lr c U V^T

The official code draws U anew for the update and, on the steps that refresh V, gets another U than it probed (its seed
then also drew V). No baseline repeats this bug: it costs no time, and without it all of them can be checked against one
reference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from benchmarks.shapes import OPTION_IDS

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
"""The six linear weights of an OPT layer: the scope that the literature calls LoRA-only. Biases are left alone."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the weights in scope, layer by layer in the order of `PROJECTIONS`."""

    out_features: tuple[int, ...]
    in_features: tuple[int, ...]

    def split_u(self, flat: Tensor) -> tuple[Tensor, ...]:
        """(sum O, ...) -> one (O, ...) view a weight."""
        return flat.split(self.out_features)

    def split_v(self, flat: Tensor) -> tuple[Tensor, ...]:
        """(sum I, ...) -> one (I, ...) view a weight."""
        return flat.split(self.in_features)


class Directions(Protocol):
    """Where U and V come from. Flat over all weights, so that drawing them is one call."""

    def u(self, step: int) -> Tensor:
        """(sum O, R) float32, fresh each step; the same again when asked again."""
        ...

    def v(self, epoch: int) -> Tensor:
        """(sum I, R) float32, one for each `interval` steps."""
        ...


@dataclass(frozen=True)
class GaussianDirections:
    """torch's own generator, seeded as the official code seeds it: one seed a step."""

    layout: Layout
    rank: int
    seed: int
    device: str = "cpu"

    def u(self, step: int) -> Tensor:
        return self._normal(sum(self.layout.out_features), 1_000_003 * self.seed + step)

    def v(self, epoch: int) -> Tensor:
        return self._normal(sum(self.layout.in_features), -1 - 1_000_003 * self.seed - epoch)

    def _normal(self, rows: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(rows, self.rank, generator=generator, device=self.device)


def layout_of(config: OPTConfig) -> Layout:
    hidden, ffn, layers = config.hidden_size, config.ffn_dim, config.num_hidden_layers
    return Layout((*[hidden] * 4, ffn, hidden) * layers, (*[hidden] * 5, ffn) * layers)


def linears_of(model: OPTForCausalLM) -> list[nn.Linear]:
    """The modules in scope, in the order of `Layout`."""
    return [layer.get_submodule(name) for layer in model.model.decoder.layers for name in PROJECTIONS]


def load_model(model_dir: str | Path, dtype: torch.dtype, device: str) -> OPTForCausalLM:
    """The checkpoint; where its directory holds a config only, a model of random weights that is made on the device."""
    if any(Path(model_dir).glob("*.safetensors")):
        return OPTForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa").to(device)
    with torch.device(device):
        config = OPTConfig.from_pretrained(model_dir)
        return OPTForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")


class Step(ABC):
    """One way to take LoZO steps on an OPT checkpoint. Owns the model; called by a benchmark child or a test.

    Args:
        model_dir: OPT checkpoint (pre-LN, embeddings as wide as the layers).
        dtype: of weights and activations. Losses are float32 and so is the state of the lazy variants.
        rank, interval, eps, lr: R, nu, probe radius and step size of LoZO.
        seed: of the directions.
        options: token ids of the two answers; each must be a single token.
        directions: takes the place of torch's generator (tests inject one).
        device: "cpu" or "cuda"; everything lives there.
    """

    name: str

    def __init__(
        self,
        model_dir: str | Path,
        dtype: torch.dtype,
        rank: int,
        interval: int,
        eps: float,
        lr: float,
        seed: int,
        options: tuple[int, int] = OPTION_IDS,
        directions: Directions | None = None,
        device: str = "cpu",
    ) -> None:
        self.rank, self.interval, self.eps, self.lr = rank, interval, eps, lr
        self.device = device
        self.options = list(options)
        self.option_index = torch.tensor(self.options, device=device)
        config = OPTConfig.from_pretrained(model_dir)
        if not config.do_layer_norm_before:
            raise ValueError(f"model_dir={str(model_dir)!r}: post-LN OPT (350M) is not written here; use another size")
        self.layout = layout_of(config)
        self.directions = directions or GaussianDirections(self.layout, rank, seed, device)
        self.dtype = dtype
        self.step_index = 0
        """Number of the next step. May be set, to skip ahead; a multiple of `interval` starts with a refresh."""
        self.losses = (0.0, 0.0)
        """(L+, L-) of the last step: mean nats per example."""
        self.load(model_dir)

    def load(self, model_dir: str | Path) -> None:
        """Make the model ready."""
        self.model = load_model(model_dir, self.dtype, self.device).eval()
        self.model.requires_grad_(False)
        self.linears = linears_of(self.model)

    @property
    def details(self) -> dict[str, Any]:
        """Choices made on this machine that a reader of the numbers should know."""
        return {}

    def prepare(self, batches: list[list[list[int]]]) -> int:
        """Whatever a user would do once before a run over such batches, untimed; how many graphs that took."""
        return 0

    def step(self, batch: list[list[int]], labels: list[int]) -> float:
        """Take one step.

        Args:
            batch: token ids of the prompts, BOS included.
            labels: index into `options` of each prompt's right answer.

        Returns:
            (L+ + L-) / 2, mean nats per example.
        """
        with torch.inference_mode():
            plus, minus = self._step(batch, torch.tensor(labels, device=self.device))
        self.losses = (plus, minus)
        self.step_index += 1
        return (plus + minus) / 2

    def coefficient(self, plus: float, minus: float) -> float:
        """Projected gradient c, nats per unit of weight."""
        return (plus - minus) / (2 * self.eps)

    @abstractmethod
    def _step(self, batch: list[list[int]], labels: Tensor) -> tuple[float, float]:
        """Refresh if due, probe both signs, update; returns (L+, L-)."""

    @abstractmethod
    def effective_weights(self) -> list[Tensor]:
        """Float32 copies of the weights as trained so far, in the order of `linears`. For tests."""


class LazyStep(Step):
    """A step that leaves W alone: `W + U_acc V^T +/- eps U V^T` is scored in factored form, and folded when V changes.

    With s = x V shared by both signs, a probe adds `[s, sign s] [U_acc, eps U]^T` to the output of a linear. The two
    blocks stay apart so that bfloat16 does not absorb one in the other.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.acc = torch.zeros(sum(self.layout.out_features), self.rank, device=self.device)
        self.v_float: tuple[Tensor, ...] = ()
        self.v: tuple[Tensor, ...] = ()
        """Per weight, (I, R) in the model's dtype; `v_float` is the same before rounding."""
        self.b: tuple[Tensor, ...] = ()
        """Per weight, (O, 2R) in the model's dtype: [U_acc, eps U]."""

    def _step(self, batch: list[list[int]], labels: Tensor) -> tuple[float, float]:
        if self.step_index % self.interval == 0 or not self.v:
            self.refresh(self.step_index // self.interval)
        u = self.directions.u(self.step_index)
        self.b = self.layout.split_u(torch.cat([self.acc, self.eps * u], dim=1).to(self.dtype))
        plus, minus = self.score(batch, labels).tolist()
        self.acc.sub_(u, alpha=self.lr * self.coefficient(plus, minus))
        return plus, minus

    def refresh(self, epoch: int) -> None:
        """Fold what has been learnt with the old V, then draw the new one."""
        if self.v:
            for linear, u, v in zip(self.linears, self.layout.split_u(self.acc), self.v_float, strict=True):
                fold(linear.weight, u, v)
            self.acc.zero_()
            self.repack()
        self.v_float = self.layout.split_v(self.directions.v(epoch))
        self.v = tuple(v.to(self.dtype) for v in self.v_float)

    def effective_weights(self) -> list[Tensor]:
        factors = zip(self.linears, self.layout.split_u(self.acc), self.v_float, strict=True)
        return [linear.weight.float().addmm(u, v.T) for linear, u, v in factors]

    def repack(self) -> None:
        """Refresh whatever was derived from the weights."""

    @abstractmethod
    def score(self, batch: list[list[int]], labels: Tensor) -> Tensor:
        """(2,) float32: L+ and L-."""

    def two_option_losses(self, last_hidden_2BH: Tensor, labels_B: Tensor) -> Tensor:
        """(2,) float32 mean cross-entropies over the two options, of the + half and the - half of the rows.

        Exact for single-token options: the normaliser over the vocabulary cancels between the two.
        """
        rows_2H = self.model.lm_head.weight[self.option_index].float()
        logits = last_hidden_2BH.float() @ rows_2H.T
        return F.cross_entropy(logits, labels_B.repeat(2), reduction="none").view(2, -1).mean(dim=1)


def fold(weight_OI: Tensor, u_OR: Tensor, v_IR: Tensor) -> None:
    """weight += u v^T, in place; added in float32 and rounded to nearest, which is the cheapest choice there is."""
    if weight_OI.dtype == torch.float32:
        weight_OI.addmm_(u_OR, v_IR.T)
    else:
        weight_OI.copy_(weight_OI.float().addmm_(u_OR, v_IR.T))


def spans(batch: list[list[int]]) -> list[tuple[int, int]]:
    """(start, end) of each prompt when all lie one after another."""
    ends = [0]
    for ids in batch:
        ends.append(ends[-1] + len(ids))
    return list(pairwise(ends))
