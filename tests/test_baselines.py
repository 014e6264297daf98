"""The benchmark baselines take the same LoZO step as a naive dense float64 computation: a fast wrong baseline proves
nothing. A tiny float32 OPT and a tiny Llama, every contender, two refreshes (so that folding counts)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not part of the installed package

from benchmarks import gpu, options
from benchmarks.baselines import CONTENDERS, OPT_ONLY, STOCK, linears, make
from benchmarks.baselines.common import Step, layout_of, linears_of, shape_of
from benchmarks.shapes import PROMPT_LENGTHS, SHAPES, Prompts, Shape, mean_longest, mean_prompt_tokens, write_checkpoint
from tests.children import Child
from tests.tiny import make_llama, make_opt

RANK, INTERVAL, EPS, LR = 2, 2, 1e-2, 3e-3
OPTIONS = (17, 5)
STEPS = 5  # refreshes before steps 0, 2 and 4: two of them fold
WHOLE_MODEL = ("official-full", "dense-mezo")
STEPPERS = [name for name in CONTENDERS if name not in ("gemms", *WHOLE_MODEL, *STOCK)]
MODELS = {"opt": make_opt, "llama": make_llama}
TINY = {
    "opt": Shape(64, 2, 2, 96, vocab=300, positions=64),
    "llama": Shape(96, 2, 6, 128, vocab=300, positions=64, kv_heads=2),
}

LOSS_TOLERANCE = 2e-5
"""Nats. A float32 forward of this model is within 1e-6 of float64; an official step also adds and subtracts eps U V^T
three times, which leaves rounding of 1e-7 in each weight. A wrong sign, row or position is off by 1e-3 and more."""
WEIGHT_TOLERANCE = 2e-5
"""Updates are 1e-3 to 1e-2 here; c inherits LOSS_TOLERANCE / eps, times lr and |u v|."""


def on_both(names: Sequence[str]) -> pytest.MarkDecorator:
    """Every contender on every architecture that it is written for."""
    cases = [(model, name) for model in MODELS for name in names if not (model == "llama" and name in OPT_ONLY)]
    return pytest.mark.parametrize(("architecture", "name"), cases, indirect=["architecture"])


@dataclass(frozen=True)
class Injected:
    """Directions that no contender could have drawn by itself."""

    rows: int
    columns: int

    def u(self, step: int) -> Tensor:
        return torch.randn(self.rows, RANK, generator=torch.Generator().manual_seed(900 + step))

    def v(self, epoch: int) -> Tensor:
        return torch.randn(self.columns, RANK, generator=torch.Generator().manual_seed(70 + epoch))


@dataclass(frozen=True)
class Reference:
    """Dense float64 LoZO, one unpadded option sequence at a time."""

    directions: Injected
    losses: list[tuple[float, float]]
    weights: list[Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small for two threads, which only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=MODELS)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model_dir(architecture: str, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[architecture]


@pytest.fixture
def reference(architecture: str, references: dict[str, Reference]) -> Reference:
    return references[architecture]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_tiny(tmp_path_factory.mktemp(name)) for name, make_tiny in MODELS.items()}


@pytest.fixture(scope="module")
def batches() -> list[tuple[list[list[int]], list[int]]]:
    return make_batches()


def make_batches() -> list[tuple[list[list[int]], list[int]]]:
    generator = torch.Generator().manual_seed(3)

    def prompt() -> list[int]:
        length = int(torch.randint(1, 12, (1,), generator=generator))
        return [2, *torch.randint(4, 512, (length,), generator=generator).tolist()]

    return [([prompt() for _ in range(4)], torch.randint(2, (4,), generator=generator).tolist()) for _ in range(STEPS)]


def naive_loss(model: Any, batch: list[list[int]], labels: list[int]) -> float:
    losses = []
    for prompt, label in zip(batch, labels, strict=True):
        logits = [model(torch.tensor([[*prompt, option]])).logits[0, -2].log_softmax(-1)[option] for option in OPTIONS]
        losses.append(-torch.stack(logits).log_softmax(0)[label])
    return float(torch.stack(losses).mean())


@pytest.fixture(scope="module")
def references(checkpoints: dict[str, Path], batches: list[tuple[list[list[int]], list[int]]]) -> dict[str, Reference]:
    return {name: naive_run(directory, batches) for name, directory in checkpoints.items()}


def naive_run(model_dir: Path, batches: list[tuple[list[list[int]], list[int]]]) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, attn_implementation="eager").eval()
    weights = [linear.weight for linear in linears_of(model, shape_of(model_dir))]
    directions = Injected(sum(len(w) for w in weights), sum(w.shape[1] for w in weights))
    losses = []
    with torch.no_grad():
        for step, (batch, labels) in enumerate(batches):
            us = directions.u(step).double().split([len(w) for w in weights])
            vs = directions.v(step // INTERVAL).double().split([w.shape[1] for w in weights])
            z = [u @ v.T for u, v in zip(us, vs, strict=True)]
            start = [w.clone() for w in weights]
            pair = []
            for sign in (1, -1):
                for w, w0, direction in zip(weights, start, z, strict=True):
                    w.copy_(w0 + sign * EPS * direction)
                pair.append(naive_loss(model, batch, labels))
            c = (pair[0] - pair[1]) / (2 * EPS)
            for w, w0, direction in zip(weights, start, z, strict=True):
                w.copy_(w0 - LR * c * direction)
            losses.append((pair[0], pair[1]))
    return Reference(directions, losses, [w.detach().clone() for w in weights])


@pytest.fixture
def build(model_dir: Path, reference: Reference) -> Callable[[str, torch.dtype], Step]:
    def of(name: str, dtype: torch.dtype) -> Step:
        return make(
            name, model_dir, dtype, RANK, INTERVAL, EPS, LR, 0, options=OPTIONS, directions=reference.directions
        )

    return of


@on_both(STEPPERS)
def test_every_baseline_has_the_losses_and_updates_of_a_naive_dense_float64_step(
    name: str,
    build: Callable[[str, torch.dtype], Step],
    reference: Reference,
    batches: list[tuple[list[list[int]], list[int]]],
) -> None:
    contender = build(name, torch.float32)
    for (batch, labels), expected in zip(batches, reference.losses, strict=True):
        mean = contender.step(batch, labels)
        assert contender.losses == pytest.approx(expected, abs=LOSS_TOLERANCE)
        assert mean == pytest.approx(sum(expected) / 2, abs=LOSS_TOLERANCE)
    for ours, theirs in zip(contender.effective_weights(), reference.weights, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=WEIGHT_TOLERANCE, rtol=0)


def test_the_floor_multiplies_by_every_weight(
    build: Callable[[str, torch.dtype], Step], batches: list[tuple[list[list[int]], list[int]]]
) -> None:
    contender: Any = build("gemms", torch.float32)
    batch, labels = batches[0]
    rows: list[int] = []
    for sites in contender.layers:
        for site in sites.values():
            site.linear = lambda x, inner=site.linear: rows.append(len(x) * inner(x).shape[1])
    contender.step(batch, labels)
    assert sum(rows) == 2 * sum(map(len, batch)) * sum(contender.layout.out_features)


@on_both(STOCK)
@pytest.mark.slow
def test_a_trainer_outside_of_stock_vllm_takes_the_same_steps(
    name: str, model_dir: Path, reference: Reference, tmp_path: Path
) -> None:
    """In a child: vLLM as released, without this package's plugin."""
    rows, columns = reference.directions.rows, reference.directions.columns
    file = tmp_path / "weights.pt"
    child = Child("take_stock_steps", name, str(model_dir), str(rows), str(columns), str(file), VLLM_PLUGINS="")
    *steps, plugin = child.finish()
    assert not plugin["patched"]
    for step, expected in zip(steps, reference.losses, strict=True):
        assert step["losses"] == pytest.approx(expected, abs=LOSS_TOLERANCE)
    for theirs, exact in zip(torch.load(file), reference.weights, strict=True):
        torch.testing.assert_close(theirs.double(), exact, atol=WEIGHT_TOLERANCE, rtol=0)


@on_both(WHOLE_MODEL)
def test_the_rules_as_released_probe_and_move_every_parameter(
    name: str, build: Callable[[str, torch.dtype], Step], batches: list[tuple[list[list[int]], list[int]]]
) -> None:
    contender: Any = build(name, torch.float32)
    batch, labels = batches[0]
    contender.v = contender.layout.split_v(contender.directions.v(0))
    moved = list(contender.perturbed())
    assert sum(parameter.numel() for parameter, _ in moved) == sum(p.numel() for p in contender.model.parameters())
    start = [parameter.clone() for parameter, _ in moved]
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for (parameter, direction), before in zip(moved, start, strict=True):
                parameter.copy_(before + sign * EPS * direction)
            losses.append(naive_loss(contender.model, batch, labels))
            for (parameter, _), before in zip(moved, start, strict=True):
                parameter.copy_(before)
    contender.step(batch, labels)
    assert contender.losses == pytest.approx(losses, abs=LOSS_TOLERANCE)
    c = contender.coefficient(*contender.losses)
    for (parameter, direction), before in zip(moved, start, strict=True):
        torch.testing.assert_close(parameter.data, before - LR * c * direction, atol=WEIGHT_TOLERANCE, rtol=0)


def test_the_reference_run_moves_losses_and_weights_by_more_than_the_tolerances(
    model_dir: Path, reference: Reference
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    starts = [linear.weight for linear in linears_of(model, shape_of(model_dir))]
    assert max(abs(plus - minus) for plus, minus in reference.losses) > 100 * LOSS_TOLERANCE
    for start, end in zip(starts, reference.weights, strict=True):
        assert (end - start).abs().max() > 50 * WEIGHT_TOLERANCE


@on_both(STEPPERS)
def test_every_baseline_runs_in_bfloat16_with_losses_near_those_of_float32(
    name: str,
    build: Callable[[str, torch.dtype], Step],
    reference: Reference,
    batches: list[tuple[list[list[int]], list[int]]],
) -> None:
    contender = build(name, torch.bfloat16)
    batch, labels = batches[0]
    contender.step(batch, labels)
    assert contender.losses == pytest.approx(reference.losses[0], abs=0.05)  # 8 bits of mantissa through two layers


@pytest.mark.parametrize("kind", linears.PREPACKED)
def test_a_prepacked_linear_multiplies_with_the_folded_weight(
    kind: str,
    build: Callable[[str, torch.dtype], Step],
    reference: Reference,
    batches: list[tuple[list[list[int]], list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which kind is fastest depends on the machine; all that work here must be right, above all after a fold."""
    try:
        linears.build(kind, torch.ones(8, 16), torch.ones(8))
    except (RuntimeError, AttributeError, ImportError) as error:
        pytest.skip(f"{kind} does not work on this machine: {error}")
    monkeypatch.setattr(linears, "fastest", lambda weight, bias: (kind, {}))
    contender = build("packed-prepacked", torch.float32)
    for (batch, labels), expected in zip(batches, reference.losses, strict=True):
        contender.step(batch, labels)
        assert contender.losses == pytest.approx(expected, abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("rows", [100, 160, 161, 426])
def test_a_product_in_parts_has_every_row(rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 48), torch.randn(40, 48), torch.randn(40)
    product = linears.onednn_in_parts(weight, bias)(x)
    torch.testing.assert_close(product, torch.nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-4)


def test_prompts_have_the_stated_lengths_and_every_epoch_holds_each_once() -> None:
    assert sum(PROMPT_LENGTHS.values()) == 1000
    assert mean_prompt_tokens() == pytest.approx(13.8, abs=0.05)
    assert mean_longest(16) == pytest.approx(34.9, abs=0.05)
    assert round(2 * 16 * mean_prompt_tokens()) == 441
    prompts = Prompts(vocab=512, batch_size=16)
    seen = [i for step in range(125) for i in prompts.indices(step)]  # 2,000 = two epochs, split inside a batch
    assert sorted(seen[:1000]) == sorted(seen[1000:]) == list(range(1000))


def test_equal_seeds_give_every_child_process_the_same_batches() -> None:
    assert Prompts(512, 16, seed=4).batch(3) == Prompts(512, 16, seed=4).batch(3)
    assert Prompts(512, 16, seed=4).batch(3) != Prompts(512, 16, seed=5).batch(3)


@pytest.mark.parametrize("shape", TINY.values(), ids=TINY)
@pytest.mark.parametrize("weights", [True, False])
def test_a_shape_counts_the_weights_of_its_checkpoint(shape: Shape, weights: bool, tmp_path: Path) -> None:
    write_checkpoint(shape, "bfloat16", tmp_path, weights=weights)
    assert shape_of(tmp_path) == shape
    contender = make("strong", tmp_path, torch.bfloat16, RANK, INTERVAL, EPS, LR, 0, options=OPTIONS)
    sizes = [linear.weight.numel() for linear in contender.linears]
    assert sum(sizes) == gpu.linear_parameters(shape)
    layout = layout_of(shape)
    assert sizes == [o * i for o, i in zip(layout.out_features, layout.in_features, strict=True)]
    matrices = [parameter.numel() for parameter in contender.model.parameters() if parameter.ndim == 2]
    unused_positions = 2 * shape.hidden * (not shape.is_llama)  # OPT's table starts with two rows that have no position
    assert sum(matrices) == gpu.parameters(shape) + unused_positions


@pytest.mark.parametrize("shape", TINY.values(), ids=TINY)
def test_the_text_of_the_prompts_has_their_token_ids(shape: Shape, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_checkpoint(shape, "float32", tmp_path, weights=False))
    prompts = Prompts(shape.vocab, 16)
    read = [tokenizer(record["sentence"]).input_ids for record in prompts.records()]
    assert read == [ids for ids, _ in prompts.rows]


def test_smollm2_has_the_weights_of_its_model_card() -> None:
    assert gpu.parameters(SHAPES["smollm2"]) + (2 * 30 + 1) * 576 == 134_515_008  # the norms, too


def test_contenders_that_do_not_know_the_shape_are_refused_or_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find", lambda: {"name": "NVIDIA H200", "memory_bytes": 150_000_000_000})
    left = options.parse(["--shape", "smollm2"], None).contenders
    assert left == ["ours", "official-full", "official", "stock-files", "gemms"]
    with pytest.raises(SystemExit):
        options.parse(["--shape", "smollm2", "--against", "official,stock-in-place"], None)
    assert "--against stock-in-place: written for OPT only, not for --shape smollm2" in capsys.readouterr().err
