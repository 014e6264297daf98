"""What the baselines share: the weights that they train, the source of directions, the loss, and the lazy step.

Shape suffixes: O out features, I in features, R rank, B examples, T tokens, H hidden. All follow one rule for each step
and linear weight W. They draw V every `interval` steps and U every step (LoZO, arXiv:2410.07698, Algorithm 1):

    c = (L(W + eps U V^T) - L(W - eps U V^T)) / (2 eps),    W <- W - lr c U V^T

The official code draws U again for the update. On the steps that refresh V it gets another U than it probed, because
its seed then also drew V. No baseline repeats this bug: it costs no time, and without it one reference can check all of
them.
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
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.shapes import OPTION_IDS, Shape


@dataclass(frozen=True)
class Layout:
    """Sizes of the trained weights, layer by layer, in the order of `Shape.linears`."""

    out_features: tuple[int, ...]
    in_features: tuple[int, ...]

    def split_u(self, flat: Tensor) -> tuple[Tensor, ...]:
        """(sum O, ...) -> one (O, ...) view a weight."""
        return flat.split(self.out_features)

    def split_v(self, flat: Tensor) -> tuple[Tensor, ...]:
        """(sum I, ...) -> one (I, ...) view a weight."""
        return flat.split(self.in_features)


class Directions(Protocol):
    """The source of U and V. Both are flat over all weights, so that one call draws them."""

    def u(self, step: int) -> Tensor:
        """(sum O, R) float32. Every step has its own; the same step gives the same numbers again."""
        ...

    def v(self, epoch: int) -> Tensor:
        """(sum I, R) float32. Every epoch of `interval` steps has its own."""
        ...


@dataclass(frozen=True)
class GaussianDirections:
    """Directions from torch's own generator. As in the official code, every step has one seed."""

    layout: Layout
    rank: int
    seed: int
    device: str = "cpu"

    # U has seeds from 0 up and V has negative ones, so no U equals a V. 1,000,003 is more steps than a benchmark takes,
    # so different seeds of a run share no step.
    def u(self, step: int) -> Tensor:
        return self._normal(sum(self.layout.out_features), 1_000_003 * self.seed + step)

    def v(self, epoch: int) -> Tensor:
        return self._normal(sum(self.layout.in_features), -1 - 1_000_003 * self.seed - epoch)

    def _normal(self, rows: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(rows, self.rank, generator=generator, device=self.device)


def shape_of(model_dir: str | Path) -> Shape:
    """The shape of a checkpoint.

    Raises:
        ValueError: it is no OPT and no Llama, or one that the baselines do not compute.
    """
    config, prefix = AutoConfig.from_pretrained(model_dir), f"model_dir={str(model_dir)!r}: "
    sizes = {
        "hidden": config.hidden_size, "layers": config.num_hidden_layers, "heads": config.num_attention_heads,
        "vocab": config.vocab_size, "positions": config.max_position_embeddings,
    }  # fmt: skip
    if config.model_type == "opt":
        if not config.do_layer_norm_before:
            raise ValueError(f"{prefix}post-LN OPT (350M) is not written here; use another size")
        return Shape(**sizes, ffn=config.ffn_dim)
    if config.model_type != "llama":
        raise ValueError(f"{prefix}a model of type {config.model_type} is not written here; use an OPT or a Llama")
    if config.hidden_act != "silu" or config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(f"{prefix}a Llama must have SiLU, and heads that are together as wide as its layers")
    return Shape(**sizes, ffn=config.intermediate_size, kv_heads=config.num_key_value_heads)


def layout_of(shape: Shape) -> Layout:
    out_features, in_features = zip(*shape.linears.values(), strict=True)
    return Layout(out_features * shape.layers, in_features * shape.layers)


def linears_of(model: Any, shape: Shape) -> list[nn.Linear]:
    """The trained modules of a causal model, in the order of `Layout`."""
    return [layer.get_submodule(name) for layer in model.get_submodule(shape.layers_path) for name in shape.linears]


def load_model(model_dir: str | Path, dtype: torch.dtype, device: str) -> Any:
    """The model of a checkpoint. If its directory holds a config only, the device makes a model of random weights."""
    if any(Path(model_dir).glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa").to(device)
    with torch.device(device):
        config = AutoConfig.from_pretrained(model_dir)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


class Step(ABC):
    """One way to take LoZO steps on a checkpoint. It owns the model; a benchmark child or a test calls it.

    Args:
        model_dir: checkpoint of an OPT (pre-LN, embeddings as wide as the layers) or a Llama.
        dtype: dtype of weights and activations. Losses are float32, and so is the state of the lazy variants.
        rank, interval, eps, lr: R, nu, probe radius and step size of LoZO.
        seed: seed of the directions.
        options: token ids of the two answers; each must be a single token.
        directions: takes the place of torch's generator (tests inject one).
        device: "cpu" or "cuda". All tensors live there.

    Raises:
        ValueError: `shape_of` does not know the checkpoint.
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
        self.shape = shape_of(model_dir)
        self.layout = layout_of(self.shape)
        self.directions = directions or GaussianDirections(self.layout, rank, seed, device)
        self.dtype = dtype
        self.step_index = 0
        """Number of the next step. A caller may set it to skip ahead. A multiple of `interval` refreshes V."""
        self.losses = (0.0, 0.0)
        """(L+, L-) of the last step: mean nats per example."""
        self.load(model_dir)

    def load(self, model_dir: str | Path) -> None:
        """Load the model."""
        self.model = load_model(model_dir, self.dtype, self.device).eval()
        self.model.requires_grad_(False)
        self.linears = linears_of(self.model, self.shape)

    @property
    def details(self) -> dict[str, Any]:
        """What the contender chose for this machine, for readers of the numbers."""
        return {}

    def prepare(self, batches: list[list[list[int]]]) -> int:
        """Do what a user would do once before a run over such batches. It is not timed.

        Returns:
            How many CUDA graphs it captured.
        """
        return 0

    def step(self, batch: list[list[int]], labels: list[int]) -> float:
        """Take one step.

        Args:
            batch: token ids of the prompts, with BOS.
            labels: for each prompt, the index of its right answer in `options`.

        Returns:
            (L+ + L-) / 2, mean nats per example.
        """
        with torch.inference_mode():
            plus, minus = self._step(batch, torch.tensor(labels, device=self.device))
        self.losses = (plus, minus)
        self.step_index += 1
        return (plus + minus) / 2

    def coefficient(self, plus: float, minus: float) -> float:
        """The projected gradient c, in nats per unit of weight."""
        return (plus - minus) / (2 * self.eps)

    @abstractmethod
    def _step(self, batch: list[list[int]], labels: Tensor) -> tuple[float, float]:
        """Refresh V if it is due, probe both signs, and update. Returns (L+, L-)."""

    @abstractmethod
    def effective_weights(self) -> list[Tensor]:
        """Float32 copies of the weights as trained so far, in the order of `linears`. The tests compare them."""


class LazyStep(Step):
    """A step that leaves W alone. It scores `W + U_acc V^T +/- eps U V^T` in factored form, and folds when V changes.

    Both signs share s = x V. A probe adds `[s, sign s] [U_acc, eps U]^T` to the output of a linear. The two blocks stay
    apart, because bfloat16 would round the smaller one away in their sum.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.acc = torch.zeros(sum(self.layout.out_features), self.rank, device=self.device)
        self.v_float: tuple[Tensor, ...] = ()
        self.v: tuple[Tensor, ...] = ()
        """For each weight (I, R) in the model's dtype; `v_float` is the same before rounding."""
        self.b: tuple[Tensor, ...] = ()
        """For each weight (O, 2R) in the model's dtype: [U_acc, eps U]."""

    def _step(self, batch: list[list[int]], labels: Tensor) -> tuple[float, float]:
        if self.step_index % self.interval == 0 or not self.v:
            self.refresh(self.step_index // self.interval)
        u = self.directions.u(self.step_index)
        self.b = self.layout.split_u(torch.cat([self.acc, self.eps * u], dim=1).to(self.dtype))
        plus, minus = self.score(batch, labels).tolist()
        self.acc.sub_(u, alpha=self.lr * self.coefficient(plus, minus))
        return plus, minus

    def refresh(self, epoch: int) -> None:
        """Fold what the old V has learnt, then draw the new V."""
        if self.v:
            for linear, u, v in zip(self.linears, self.layout.split_u(self.acc), self.v_float, strict=True):
                # The V before rounding to the model's dtype: only the scoring needs the rounded one.
                fold(linear.weight, u, v)
            self.acc.zero_()
            self.repack()
        self.v_float = self.layout.split_v(self.directions.v(epoch))
        self.v = tuple(v.to(self.dtype) for v in self.v_float)

    def effective_weights(self) -> list[Tensor]:
        factors = zip(self.linears, self.layout.split_u(self.acc), self.v_float, strict=True)
        return [linear.weight.float().addmm(u, v.T) for linear, u, v in factors]

    def repack(self) -> None:
        """Make again what a subclass derived from the weights (packed copies)."""

    @abstractmethod
    def score(self, batch: list[list[int]], labels: Tensor) -> Tensor:
        """(2,) float32: L+ and L-."""

    def two_option_losses(self, last_hidden_2BH: Tensor, labels_B: Tensor) -> Tensor:
        """(2,) float32 mean cross-entropies over the two options, for the first half of the batch (+) and the second.

        They are exact for single-token options, because the normaliser over the vocabulary cancels between the two.
        """
        # float32 for the head too: the step needs the difference of two nearly equal losses.
        rows_2H = self.model.lm_head.weight[self.option_index].float()
        logits = last_hidden_2BH.float() @ rows_2H.T
        return F.cross_entropy(logits, labels_B.repeat(2), reduction="none").view(2, -1).mean(dim=1)


def fold(weight_OI: Tensor, u_OR: Tensor, v_IR: Tensor) -> None:
    """weight += u v^T in place. The addition is in float32 and rounds to nearest, which is the cheapest choice."""
    if weight_OI.dtype == torch.float32:
        weight_OI.addmm_(u_OR, v_IR.T)
    else:
        weight_OI.copy_(weight_OI.float().addmm_(u_OR, v_IR.T))


def spans(batch: list[list[int]]) -> list[tuple[int, int]]:
    """(start, end) of each prompt, if all lie one after another."""
    ends = [0]
    for ids in batch:
        ends.append(ends[-1] + len(ids))
    return list(pairwise(ends))


def attend_within(where: list[tuple[int, int]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within each of the spans `where`, for both signs at once.

    q, k and v are (2, heads, T, head size), the result is (2T, H). k and v may have fewer heads, each for a group of
    the queries' heads.
    """
    signs, heads, tokens, size = q.shape
    out = torch.empty(signs, tokens, heads, size, dtype=q.dtype, device=q.device)
    grouped = k.shape[1] != heads
    for start, end in where:
        q_part, k_part, v_part = (x[:, :, start:end] for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q_part, k_part, v_part, is_causal=True, enable_gqa=grouped)
        out[:, start:end] = attended.transpose(1, 2)
    return out.view(signs * tokens, -1)
