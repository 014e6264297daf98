"""What a run gives away, loaded by others: `peft`, `transformers` and a stock vLLM answer as the trained engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import scores
from tests.children import Child
from tests.engines import Engines
from tests.trajectories import STEPS, base_weights, train
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.entrypoints.cli.saved import replay_job

FAMILIES = ["opt", "qwen2"]
"""Qwen2 packs gate and up besides q, k and v, has grouped-query attention, and biases on q, k and v only."""
ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama with embeddings and head": ("llama", {"target_modules": ".*", "learning_rate": 1e-3}),
    "llama's embeddings": ("llama", {"target_modules": "embeddings", "learning_rate": 1e-3}),
    "llama's head": ("llama", {"target_modules": "lm_head", "learning_rate": 1e-3}),
}
"""Name -> family and options of a `bank` run."""
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
VISIBLE = 0.05
"""Nats that training must move some token by: a hundred times the tolerance."""


def load(directory: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def assert_trained(tuned: list[float], base: list[float]) -> None:
    assert max(abs(a - b) for a, b in zip(tuned, base, strict=True)) > VISIBLE, "the update must show"


@pytest.fixture(scope="module")
def trained(engines: Engines) -> dict[str, tuple[Any, list[float]]]:
    """By name: a `bank` run, and what its engine answers with its adapter."""
    found = {}
    for name, (family, options) in ADAPTED.items():
        llm, model = engines.get(family), engines.model(family)
        run = train(llm, **{"learning_rate": 3e-2, **options})
        answers = scores.of_vllm(llm, model, lora_request=run.lora_request)
        assert_trained(answers, scores.of_vllm(llm, model))
        found[name] = run, answers
    return found


@pytest.fixture(scope="module")
def saved(trained: dict[str, tuple[Any, list[float]]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: the adapter directory of the run."""
    found = {}
    for name, (run, _) in trained.items():
        found[name] = tmp_path_factory.mktemp("adapter")
        run.save(found[name])
    return found


@pytest.mark.parametrize("name", ADAPTED)
def test_a_saved_adapter_answers_in_peft_as_in_the_engine(
    engines: Engines, trained: dict[str, tuple[Any, list[float]]], saved: dict[str, Path], name: str
) -> None:
    directory = engines.model(ADAPTED[name][0])
    model = PeftModel.from_pretrained(load(directory), saved[name])
    assert scores.of_transformers(model, directory) == pytest.approx(trained[name][1], abs=scores.TOLERANCE)


@pytest.mark.slow
def test_a_saved_adapter_answers_in_stock_vllm_as_in_the_engine(
    engines: Engines, trained: dict[str, tuple[Any, list[float]]], saved: dict[str, Path]
) -> None:
    """In a process that never imports this package: another LoRA kernel, another loader."""
    names = [*FAMILIES, "llama with embeddings and head"]
    pairs = [f"{engines.model(ADAPTED[name][0])}:{saved[name]}" for name in names]
    reports = Child("answer_in_stock_vllm", *pairs, VLLM_PLUGINS="").finish()
    for name, report in zip(names, reports, strict=True):
        assert report["answers"] == pytest.approx(trained[name][1], abs=scores.TOLERANCE)


@pytest.mark.parametrize("name", ADAPTED)
def test_a_merged_bank_run_answers_in_transformers_as_in_the_engine(
    trained: dict[str, tuple[Any, list[float]]], name: str, tmp_path: Path
) -> None:
    run, answers = trained[name]
    run.save_merged(tmp_path)
    assert scores.of_transformers(load(tmp_path), tmp_path) == pytest.approx(answers, abs=scores.TOLERANCE)


@pytest.mark.parametrize("case", ADAPTED)
def test_the_log_alone_gives_the_state_and_the_adapter_bit_for_bit(
    trained: dict[str, tuple[Any, list[float]]], saved: dict[str, Path], case: str, tmp_path: Path
) -> None:
    run, _ = trained[case]
    shutil.copyfile(run.directory / "seeds.log", tmp_path / "seeds.log")
    log = read_seed_log(tmp_path / "seeds.log")
    assert log.num_steps == run.version == STEPS
    assert torch.equal(rebuild_state(log).acc_BN, load_file(run.version_file)["acc_BN"])
    assert list(replay_job(tmp_path, output=tmp_path / "adapter"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (saved[case] / name).read_bytes()


@pytest.fixture
def folded(engines: Engines, request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """An engine whose base a `fold` run has just written, and the run."""
    llm = engines.get(request.param)
    run = train(llm, "fold", learning_rate=3e-2)
    yield llm, run
    llm.restore_base(run)


@pytest.mark.parametrize("folded, family", [(family, family) for family in FAMILIES], indirect=["folded"])
def test_a_merged_fold_run_is_the_base_of_its_engine(
    engines: Engines, folded: tuple[Any, Any], family: str, tmp_path: Path
) -> None:
    (llm, run), model = folded, engines.model(family)
    run.save_merged(tmp_path)
    checkpoint, untrained = load_file(tmp_path / "model.safetensors"), load_file(model / "model.safetensors")
    for name, weight in base_weights(llm).items():
        assert torch.equal(weight, packed(checkpoint, name)), name
        assert not torch.equal(weight, packed(untrained, name)), name
    assert set(checkpoint) == set(untrained)

    answers = scores.of_vllm(llm, model)
    assert scores.of_transformers(load(tmp_path), tmp_path) == pytest.approx(answers, abs=scores.TOLERANCE)
    assert_trained(answers, scores.of_transformers(load(model), model))


def packed(checkpoint: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """The checkpoint's weight of a vLLM layer, whose rows may be several modules'."""
    parent, _, leaf = layer.rpartition(".")
    return torch.cat([checkpoint[f"{parent}.{part}.weight"] for part in PACKED.get(leaf, (leaf,))])
