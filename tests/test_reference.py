"""The oracle itself, against a dense LoZO written here with nothing of the package but its noise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from tests.reference import ReferenceTrainer, trainable
from vllm_zo import noise
from vllm_zo.methods import FactorizedMeZO, LoZO
from vllm_zo.methods.fold import fold_into
from vllm_zo.objectives.base import EncodedExample, ScoringSequence

JOB_SEED = 9
LABELS = (17, 23)


class TwoLabels:
    """Cross-entropy over two labels, in the dtype of the cells: the package's objectives round to float32."""

    name = "two-labels"

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        raise NotImplementedError

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        logits_PE2 = cells_PC.unflatten(1, (-1, 2))
        gold = [e.gold for e in examples]
        return -logits_PE2.log_softmax(-1)[:, range(len(gold)), gold], logits_PE2.argmax(-1)


class Likelihood(TwoLabels):
    """Mean negative log-likelihood of the only row of each example; rows may differ in length."""

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        parts = cells_PC.split([e.sequences[0].num_cells for e in examples], dim=1)
        losses_PE = -torch.stack([part.chunk(2, dim=1)[0].mean(dim=1) for part in parts], dim=1)
        return losses_PE, torch.zeros_like(losses_PE, dtype=torch.int64)


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    """Two layers; `word_embed_proj_dim` gives it linear modules outside the layers, as OPT-350M has."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40, hidden_size=16, word_embed_proj_dim=12, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24,
        max_position_embeddings=32, init_std=0.3, dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


@pytest.fixture(scope="module")
def examples() -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (5, 9, 7):
        tokens = torch.randint(4, 40, (length,), generator=generator).tolist()
        rows.append(ScoringSequence(tuple(tokens), (length - 1,), LABELS, "labels"))
    return [EncodedExample((row,), gold=i % 2) for i, row in enumerate(rows)]


def trainer(model: OPTForCausalLM, method: Any, space: str, **options: Any) -> ReferenceTrainer:
    settings = {"job_seed": JOB_SEED, "update_space": space, "dtype": torch.float64} | options
    return ReferenceTrainer(model, method, settings.pop("objective", TwoLabels()), **settings)


def dense_lozo(
    model: OPTForCausalLM,
    batches: list[list[EncodedExample]],
    lr: float,
    *,
    rank: int,
    interval: int,
    eps: float,
    cycle: int,
) -> tuple[OPTForCausalLM, list[tuple[float, float]]]:
    """LoZO by adding dense float64 perturbations to the weights, one example at a time; the mean losses at + and -."""
    model = copy.deepcopy(model).double()
    weights = {n: p for n, p in model.named_parameters() if ".layers." in n and n.endswith("weight") and p.dim() == 2}

    def factor(key: int, name: str, rows: int) -> Tensor:
        return noise.normal(key, noise.ElementRanges.of([(name, 0, rows * rank)]), "cpu").double().view(rows, rank)

    def mean_loss(batch: list[EncodedExample]) -> Tensor:
        logits = [model(torch.tensor([e.sequences[0].token_ids])).logits[0, -1, list(LABELS)] for e in batch]
        return torch.stack([-x.log_softmax(0)[e.gold] for x, e in zip(logits, batch, strict=True)]).mean()

    log = []
    with torch.no_grad():
        for step, batch in enumerate(batches):
            v_key = noise.derive_key(JOB_SEED, "V", (step // interval) % cycle)
            u_key = noise.derive_key(JOB_SEED, "U", step, 0)
            z = {}
            for full_name, p in weights.items():
                name = full_name.removesuffix(".weight")
                z[full_name] = factor(u_key, name, p.shape[0]) @ factor(v_key, name, p.shape[1]).T
            losses = []
            for change in (+eps, -2 * eps):
                for full_name, p in weights.items():
                    p += change * z[full_name]
                losses.append(mean_loss(batch))
            for full_name, p in weights.items():
                p += (eps - lr * (losses[0] - losses[1]) / (2 * eps)) * z[full_name]
            log.append((float(losses[0]), float(losses[1])))
    return model, log


@pytest.mark.parametrize(("space", "num_bases"), [("bank", 3), ("bank", 4), ("fold", 1)])
def test_the_reference_equals_a_dense_lozo(
    model: OPTForCausalLM, examples: list[EncodedExample], space: str, num_bases: int
) -> None:
    """Eight steps, four intervals; with three bases one of them returns.

    Tolerances: accumulators, coefficients and folded weights are float32 in the reference, 6e-8 of weights near 1; the
    network multiplies that by less than 10 on its way to the loss.
    """
    batches = [[examples[step % 3], examples[(step + 1) % 3]] for step in range(8)]
    cycle = num_bases if space == "bank" else len(batches)
    dense, log = dense_lozo(model, batches, lr=0.01, rank=2, interval=2, eps=1e-2, cycle=cycle)
    reference = trainer(model, LoZO(rank=2, interval=2, eps=1e-2), space, num_bases=num_bases)
    for step, (batch, expected) in enumerate(zip(batches, log, strict=True)):
        losses_PE, coefficients_K = reference.step(step, batch, 0.01)
        assert losses_PE.mean(dim=1).tolist() == pytest.approx(expected, abs=2e-6)
        assert coefficients_K.tolist() == pytest.approx([(expected[0] - expected[1]) / 2e-2], abs=2e-4)
    moved = 0.0
    for name, weight in reference.weights().items():
        torch.testing.assert_close(weight, trainable(dense)[name].weight, rtol=0, atol=5e-6)
        moved = max(moved, float((weight - trainable(model)[name].weight.detach()).abs().max()))
    assert moved > 0.02, "the run hardly moved; the comparison would prove nothing"


def test_scope_is_the_linear_modules_of_the_layers_and_the_head(model: OPTForCausalLM) -> None:
    attention = [f"self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
    names = [f"model.decoder.layers.{i}.{module}" for i in (0, 1) for module in [*attention, "fc1", "fc2"]]
    assert set(trainable(model)) == {*names, "lm_head"}
    assert "model.decoder.project_in" in dict(model.named_modules())
    assert set(trainer(model, LoZO(), "fold").names) == set(names)
    assert trainer(model, LoZO(), "fold", target_modules="mlp").names == [n for n in names if "fc" in n]


def test_log_probabilities_agree_with_the_loss_of_transformers(model: OPTForCausalLM) -> None:
    tokens = [[5, 9, 31, 12, 7, 8], [30, 6, 22]]
    rows = [ScoringSequence(tuple(t[:-1]), tuple(range(len(t) - 1)), tuple(t[1:]), "logprobs") for t in tokens]
    rows[0] = ScoringSequence(rows[0].token_ids, (3, 4), rows[0].label_ids[3:], "logprobs")  # the last two tokens only
    expected = []
    for ids, ignored in zip(tokens, (4, 0), strict=True):
        labels = torch.tensor([ids])
        labels[:, :ignored] = -100
        expected.append(model(torch.tensor([ids]), labels=labels).loss.item())
    reference = trainer(model, LoZO(), "bank", objective=Likelihood())
    losses_PE, _ = reference.score([EncodedExample((row,)) for row in rows])
    assert losses_PE[0].tolist() == pytest.approx(expected, abs=1e-5)  # transformers computes in float32


def test_every_probe_of_a_plan_is_scored_at_its_own_weights(
    model: OPTForCausalLM, examples: list[EncodedExample]
) -> None:
    method = LoZO(rank=2, interval=2, queries=2)
    reference = trainer(model, method, "bank")
    losses_PE, _ = reference.step(0, examples, 0.0)
    plan = method.plan(JOB_SEED, 0, 0)
    for index, row in enumerate(losses_PE):
        assert torch.equal(row, reference.score(examples, reference.state.offset(plan, index))[0][0])
    assert len(set(losses_PE[:, 0].tolist())) == 4


def test_the_base_is_written_in_fold_only_and_the_callers_model_never(
    model: OPTForCausalLM, examples: list[EncodedExample]
) -> None:
    before = {name: linear.weight.clone() for name, linear in trainable(model).items()}
    for space, written in [("bank", False), ("fold", True)]:
        reference = trainer(model, LoZO(interval=2), space)
        for step in range(3):
            reference.step(step, examples, 0.1)
        for name in reference.names:
            weight = before[name]
            assert torch.equal(reference.base[name], weight) != written
            assert torch.equal(trainable(model)[name].weight, weight)


def test_a_bf16_model_is_folded_in_bf16_with_the_key_of_the_step(
    model: OPTForCausalLM, examples: list[EncodedExample]
) -> None:
    half = copy.deepcopy(model).bfloat16()
    reference = trainer(half, LoZO(interval=2), "fold", dtype=torch.float32)
    reference.step(0, examples, 0.1)
    reference.step(1, examples, 0.1)
    us = reference.layout.split_u(reference.state.acc_BN[0].clone())
    vs = reference.layout.split_v(reference.state.frozen(0))
    reference.step(2, examples, 0.0)
    key = noise.derive_key(JOB_SEED, "fold", 2)
    for name, u, v in zip(reference.names, us, vs, strict=True):
        expected = fold_into(trainable(half)[name].weight.detach(), u, v, key, name)
        assert reference.base[name].dtype == torch.bfloat16
        assert torch.equal(reference.base[name], expected)


def test_factorized_mezo_folds_at_every_step(model: OPTForCausalLM, examples: list[EncodedExample]) -> None:
    reference = trainer(model, FactorizedMeZO(rank=4), "fold")
    bases = [copy.deepcopy(reference.base)]
    for step in range(3):
        reference.step(step, examples, 0.1)
        bases.append(copy.deepcopy(reference.base))
    name = reference.names[0]
    assert torch.equal(bases[0][name], bases[1][name])  # the first step's update is folded before the second
    assert not torch.equal(bases[1][name], bases[2][name]) and not torch.equal(bases[2][name], bases[3][name])


def test_a_loss_that_is_not_finite_changes_nothing(model: OPTForCausalLM, examples: list[EncodedExample]) -> None:
    class Broken(TwoLabels):
        def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
            losses_PE, predictions_PE = super().loss(cells_PC, examples)
            losses_PE[0, 0] = float("nan")
            return losses_PE, predictions_PE

    reference = trainer(model, LoZO(queries=2), "bank", objective=Broken())
    losses_PE, coefficients_K = reference.step(0, examples, 0.1)
    assert losses_PE.isnan().any() and coefficients_K.tolist() == [0.0, 0.0]
    assert (reference.state.acc_BN == 0).all()
