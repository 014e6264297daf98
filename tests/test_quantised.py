"""A quantised base trains: what its plain twin learns, in `peft` what it serves, and the base itself stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.quantised import DTYPES, FORMATS, quantise
from tests import scores
from tests.engines import SENTIMENT, Engines, reviews
from tests.test_architectures import TINY
from vllm_zo import ConfigError, LoZO
from vllm_zo.entrypoints.llm.options import engine_options
from vllm_zo.worker.cpu.linear import has_avx512

JOB: dict[str, Any] = {
    "objective": SENTIMENT, "method": LoZO(rank=2, interval=2, eps=3e-2), "batch_size": 4, "steps": 4, "bases": 2,
    "learning_rate": 3e-3, "seed": 3, "progress": False,
}  # fmt: skip
TOLERANCE = {"gptq": 2e-2, "awq": 2e-2, "int8": 0.1}
"""Nats. Float16 rounds logits of size 10 to 1e-2. int8 activations have 7 bits: an error of 1e-2 a layer, and a value
at the border between two of them may fall to either side."""
VISIBLE = 0.2
"""Nats that training must move some token by."""


@pytest.fixture(scope="module", params=FORMATS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def models(name: str, engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quantised Llama, and the plain one that it stands for."""
    return quantise(engines.model("llama"), name, tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="module")
def llm(name: str, models: tuple[Path, Path], engines: Engines) -> Any:
    if not has_avx512():
        pytest.skip("this CPU has no AVX-512, and vLLM no right product of quantised weights for it")
    engines.add(name, models[0])
    return engines.get(name, dtype=DTYPES[name], **TINY)


def plain(models: tuple[Path, Path], name: str) -> Any:
    """The twin in `transformers`, in float32; of int8 its activations are rounded as vLLM's kernel does."""
    model = AutoModelForCausalLM.from_pretrained(models[1], dtype=torch.float32, attn_implementation="eager").eval()
    if name == "int8":
        for layer in model.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_pre_hook(lambda layer, inputs: (rounded(inputs[0]),))
    return model


def rounded(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round() * scale


def test_it_takes_the_steps_of_its_plain_twin(llm: Any, name: str, models: tuple[Path, Path], engines: Engines) -> None:
    engines.add(f"{name}, plain", models[1])
    twin = engines.get(f"{name}, plain", dtype=DTYPES[name], **TINY)
    runs = [one.finetune(reviews(12, seed=1), **JOB) for one in (llm, twin)]
    for mine, theirs in zip(*(run.history for run in runs), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE[name])
    # A difference of two losses over 2 EPS: their rounding is divided by it.
    first = [run.history[0]["coefficients"] for run in runs]
    assert first[0] == pytest.approx(first[1], abs=TOLERANCE[name] / JOB["method"].eps) and any(first[0])


def test_peft_computes_what_the_engine_serves(llm: Any, name: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    assert scores.of_vllm(llm, models[0]) == pytest.approx(
        scores.of_transformers(plain(models, name), models[0]), abs=TOLERANCE[name]
    )
    # Three times the rate moves no token further. But the factors grow, and what float16 rounds of them with it.
    run = llm.finetune(reviews(12, seed=1), **{**JOB, "steps": 12, "learning_rate": 3e-3})
    answers = scores.of_vllm(llm, models[0], lora_request=run.lora_request)
    moved = [abs(a - b) for a, b in zip(answers, scores.of_vllm(llm, models[0]), strict=True)]
    assert max(moved) > max(VISIBLE, TOLERANCE[name])
    run.save(tmp_path / "adapter")
    tuned = PeftModel.from_pretrained(plain(models, name), tmp_path / "adapter")
    assert scores.of_transformers(tuned, models[0]) == pytest.approx(answers, abs=TOLERANCE[name])
    with pytest.raises(ConfigError, match="quantised base cannot be merged into, export"):
        run.save_merged(tmp_path / "merged")


def test_fold_is_refused(llm: Any) -> None:
    with pytest.raises(ConfigError, match="update_space='fold' writes the base weights, and the base is quantised"):
        llm.finetune(reviews(4), **{**JOB, "update_space": "fold", "bases": None})


def test_without_avx512_it_is_refused_before_weights_are_read(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": False})
    with pytest.raises(ConfigError, match=r"weights are quantised \([\w-]+\), and vLLM has no right product"):
        engine_options(str(models[0]), True, {})
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # another architecture
    assert engine_options(str(models[0]), True, {})["enable_lora"]
