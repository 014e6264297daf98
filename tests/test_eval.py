"""`vllm-zo eval`: the numbers are those of `llm.evaluate`, of the base and of a job's state."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli import use_engine, vllm_zo, write_jsonl
from tests.engines import Engines, reviews
from tests.openai_server import KEY, Servers, create, upload_reviews, wait_for
from vllm_zo import LoZO
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.cli import train as train_module
from vllm_zo.tasks import load_task

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "train.jsonl", reviews(520, seed=1))
    write_jsonl(tmp_path / "validation.jsonl", reviews(30, seed=2))
    return tmp_path


def test_the_base_and_what_a_job_has_learnt_are_measured(
    engines: Engines, data: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, started = engines.get(), []
    task = load_task("sst2", data=data)
    run = llm.finetune(
        task.train, task.validation[:8], objective=task.objective, method=LoZO(rank=2, interval=3, eps=1e-2), steps=9,
        batch_size=4, learning_rate=3e-2, bases=3, keep_best=False, output_dir=str(data / "job"), progress=False,
    )  # fmt: skip

    def start(*arguments: Any, **_: Any) -> Any:
        started.append(arguments)
        return llm

    monkeypatch.setattr(train_module, "start_engine", start)
    flags = ["--tasks", "sst2", "--data", data, "--max-model-len", 100, "--engine-option", "seed=3"]
    ended = vllm_zo(capsys, "eval", "--job", data / "job", *flags, "--json")
    assert ended.status == 0, ended.err
    told = json.loads(ended.out)
    assert (told["task"], told["rows"]) == ("sst2", 30)
    assert told["job"] == pytest.approx(llm.evaluate(task.test, task.final_objective, run=run), abs=1e-5)
    assert told["base"] == pytest.approx(llm.evaluate(task.test, task.final_objective), abs=1e-5)
    assert abs(told["job"]["loss"] - told["base"]["loss"]) > 1e-3
    model, zo, engine = started[0]
    assert (model, engine) == (str(engines.model("opt")), {"max_model_len": 100, "seed": 3})
    assert zo == ZOTrainingConfig(slot_rank=8), "four blocks of rank 2"
    (data / "sst2").mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        shutil.copyfile(data / name, data / "sst2" / name)
    ended = vllm_zo(capsys, "eval", "--model", engines.model("opt"), "--tasks", "sst2,sst2", *flags[2:])
    assert ended.out.splitlines() == 2 * ["sst2, 30 test rows", ended.out.splitlines()[1]]
    assert ended.out.splitlines()[1].startswith(f"  base: loss {told['base']['loss']:.4f}, accuracy ")


def test_what_cannot_be_evaluated_is_refused_before_an_engine_starts(
    data: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, None)
    adapter = data / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for flags, message in (
        (["--tasks", "mmlu", "--model", "m"], "--tasks mmlu: expected sst2, "),
        (["--tasks", ",", "--model", "m"], "--tasks ,: expected sst2, "),
        (["--tasks", "sst2", "--data", data], "--model is missing"),
        (["--tasks", "sst2", "--job", adapter], f"--job {adapter}: a PEFT adapter alone. Merge it into its base"),
        (["--tasks", "sst2", "--job", data], f"--job {data}: no job.json and seeds.log there"),
        (["--tasks", "sst2", "--model", "m", "--data", data / "none"], "no such directory"),
    ):
        ended = vllm_zo(capsys, "eval", *flags)
        assert ended.status == 2 and message in ended.error


TASK = """\
task: reviews
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{sentence}}}} It was"
doc_to_choice: [terrible, great]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_scores_the_base_and_a_job_on_the_server(servers: Servers, data: Path) -> None:
    """The command of docs/recipes.md, on a task of its own file. Its numbers are ours."""
    server = servers.running()
    client = server.client()
    held_out = client.files.create(file=(data / "validation.jsonl").open("rb"), purpose="fine-tune").id
    hyperparameters = {"steps": 40, "learning_rate": 3e-2, "n_evals": 1}
    job = create(client, upload_reviews(client, 24), validation_file=held_out, hyperparameters=hyperparameters)
    wait_for(client, job.id, "succeeded")
    (data / "reviews.yaml").write_text(TASK.format(file=data / "validation.jsonl"))

    def harness(model: str) -> dict[str, float]:
        address = f"base_url={server.url}/v1/completions"
        settings = f"model={model},{address},tokenizer={servers.model},add_bos_token=True,num_concurrent=4"
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", settings,
            "--tasks", "reviews", "--include_path", str(data), "--output_path", str(data / model),
        ]  # fmt: skip
        ended = subprocess.run(
            command, env=os.environ | {"OPENAI_API_KEY": KEY}, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        (results,) = (data / model).rglob("results_*.json")
        scores: dict[str, float] = json.loads(results.read_text())["results"]["reviews"]
        return scores

    base, tuned = harness("tiny"), harness(f"job:{job.id}")
    events = client.fine_tuning.jobs.list_events(job.id, limit=1000).data
    ours = {
        event.data["step"]: event.data["full_valid_mean_token_accuracy"]
        for event in events
        if event.data and event.data.get("full_valid_mean_token_accuracy") is not None
    }
    assert base["acc,none"] == pytest.approx(ours[0], abs=0.04), "a rounding may move one row"
    assert tuned["acc,none"] == pytest.approx(ours[40], abs=0.04)
