"""benchmarks/experiment.py and search.py: contenders are compared on the same rows by the same loss."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import experiment, search
from benchmarks.baselines.lora_backprop import LoraTrainer
from tests.engines import SENTIMENT, Engines, reviews
from vllm_zo import MultipleChoice
from vllm_zo.data.encode import encode_examples
from vllm_zo.slot_fit import resolve_bases
from vllm_zo.tasks import Task

ROOT = Path(__file__).parents[1]
CHOICE = MultipleChoice("{sentence}", ["first", "second"], loss_kind="likelihood")


@pytest.fixture
def task() -> Task:
    return Task("sst2", SENTIMENT, reviews(64, seed=1), reviews(10, seed=2), reviews(10, seed=3), SENTIMENT)


def backprop(model: Path, objective: Any, rows: list[dict[str, Any]]) -> tuple[LoraTrainer, list[Any]]:
    from transformers import AutoTokenizer

    trainer = LoraTrainer(str(model), torch.float32, (), checkpointing=False, device="cpu")
    return trainer, encode_examples(rows, objective, AutoTokenizer.from_pretrained(model), 256, "rows")


@pytest.mark.parametrize("objective", [SENTIMENT, CHOICE], ids=["labels", "logprobs"])
def test_lora_begins_at_the_loss_that_the_engine_measures_and_lowers_it(engines: Engines, objective: Any) -> None:
    rows = [{**row, "first": "good and long", "second": "bad"} for row in reviews(20, seed=4)]
    trainer, examples = backprop(engines.model("opt"), objective, rows)
    before = trainer.evaluate(objective, examples)
    assert before == pytest.approx(engines.get().evaluate(rows, objective), abs=1e-4)
    for _ in range(10):
        trainer.learn(objective, examples)
    assert trainer.evaluate(objective, examples)["loss"] < before["loss"] - 1e-3


@pytest.mark.parametrize("contender", experiment.JOBS)
def test_a_job_is_measured_before_and_after(engines: Engines, task: Task, contender: str) -> None:
    llm = engines.get("llama", zo_training=experiment.SLOTS) if "head" in contender else engines.get()
    options = experiment.JOBS[contender]
    if measures := experiment.measures(options):
        options = {**options, "bases": 4}  # the tiny model has no more directions
    zero_shot = experiment.prompted(llm, task, 0)
    assert experiment.steps_for(llm, task, options, cpu_seconds=1e-3) >= 1
    assert experiment.steps_for(llm, task, options, cpu_seconds=1e3) > 100
    result = experiment.train(llm, task, {**options, "learning_rate": 3e-3}, 5, seed=0)
    assert [point["step"] for point in result["curve"]] == [0, 2, 4, 5]
    assert result["curve"][-1]["spent"] == result["spent"]
    assert (result["curve"][0]["spent"] > 0) == measures
    assert {k: result["curve"][0][k] for k in ("loss", "accuracy")} == pytest.approx(zero_shot["validation"], abs=1e-5)
    assert experiment.prompted(llm, task, 0)["test"] == zero_shot["test"]  # `fold` was taken back
    assert f"| {contender} | 0 | float32 | 5 |" in experiment.report([line(result, contender)])


def test_a_job_stops_when_its_seconds_are_spent(engines: Engines, task: Task) -> None:
    result = experiment.train(engines.get(), task, {"learning_rate": 1e-3}, 10**5, seed=0, cpu_seconds=0.05)
    assert 0 < result["steps"] < 10**4 and result["curve"][-1]["step"] == result["steps"]


def line(result: dict[str, Any], contender: str) -> dict[str, Any]:
    head = {"model": "tiny", "task": "sst2", "cpu_seconds": 1.0, "seed": 0, "rows": [64, 10, 10], "cpu": "one"}
    return {**head, "contender": contender, "dtype": "float32", **result}


def test_demonstrations_stand_in_front_with_their_answers_and_the_classes_in_turns(
    engines: Engines, task: Task
) -> None:
    shown = experiment.with_demonstrations(task, 4, engines.get().get_tokenizer())
    chosen = experiment.mixed(task, 4)
    assert [row["label"] for row in chosen] in ([0, 1, 0, 1], [1, 0, 1, 0])
    answers = [SENTIMENT.options[row["label"]] for row in chosen]
    texts = shown.test[0]["shown"].split("\n\n")
    assert texts == [f"{row['sentence']} It was{answer}" for row, answer in zip(chosen, answers, strict=True)]
    assert shown.objective.template == "{shown}\n\n{sentence} It was"


@pytest.mark.parametrize("trick", search.TRICKS)
def test_every_trick_is_a_job_that_the_bench_can_run(trick: str) -> None:
    options = search.options_of(f"top-third, {trick}")
    assert 1 <= resolve_bases(options["method"], "bank", 100, search.SLOTS["slot_rank"], options["bases"]) <= 31


def test_a_step_of_the_upper_third_costs_a_third_of_the_passes() -> None:
    everywhere, third = (search.options_of(place) for place in ("all", "top-third, cosine"))
    assert search.steps_within(6400, everywhere, layers=30, rows=1000) == 200
    # 1,000 rows once through the lower two thirds: 667 passes; 32 / 3 a step.
    assert search.steps_within(6400, third, layers=30, rows=1000) == pytest.approx((6400 - 667) / (32 / 3), abs=1)
    assert third["lr_schedule"] == "cosine"


def test_the_search_shows_the_factor_with_the_lowest_validation_loss() -> None:
    head = {"model": "tiny", "task": "sst2", "passes": 100, "seed": 0, "variant": "all", "steps": 3, "spent": 1.0}
    runs = [
        {**head, "factor": 0.3, "validation": {"loss": 0.6, "accuracy": 0.5}},
        {**head, "factor": 1.0, "validation": {"loss": 0.5, "accuracy": 0.6}},
        {**head, "factor": 3.0, "diverged": "why"},
    ]
    assert "| all | 0 | 3 | 1 | 0.3: 0.600, 1: 0.500, 3: inf | 0.500 | 0.600 |" in search.report(runs)
    assert math.isinf(search.loss_of(runs[2]))


def test_what_is_done_is_not_wanted_again(tmp_path: Path) -> None:
    args = experiment.parse(
        ["--model", "somewhere/tiny", "--tasks", "sst2", "--contenders", "zero-shot; bank; lora", "--cpu-seconds", "1",
         "--seeds", "0,1", "--output", str(tmp_path / "results.jsonl")]
    )  # fmt: skip
    cells = experiment.cells_of(args)
    assert len(cells) == 5  # what learns nothing has one seed
    assert experiment.missing(args, experiment.KEY, cells) == cells
    args.output.write_text(json.dumps(line({}, "bank")) + "\n")
    assert set(cells) - set(experiment.missing(args, experiment.KEY, cells)) == {("sst2", "bank", 1.0, 0)}
    longer = experiment.cells_of(Namespace(**{**vars(args), "cpu_seconds": 2.0}))
    assert experiment.missing(args, experiment.KEY, longer) == longer


@pytest.mark.slow  # two processes that load a model each
def test_the_experiment_runs_from_end_to_end_on_the_demo_model(tmp_path: Path) -> None:
    data = tmp_path / "sst2"
    data.mkdir()
    for part, count in (("train", 110), ("validation", 20)):
        (data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews(count)))
    common = ["--data", tmp_path, "--tasks", "sst2", "--rows", 90, 20, 20, "--dtype", "float32", "--output"]
    run("experiment.py", *common, tmp_path / "results.jsonl", "--cpu-seconds", 1)
    lines = experiment.results(tmp_path / "results.jsonl")
    assert {line["contender"] for line in lines} == {*experiment.CONTENDERS, f"lora, {experiment.LONGER} times as long"}
    variant = ["--variants", "top-third, cosine", "--factors", 1, "--passes", 320]
    run("search.py", *common, tmp_path / "search.jsonl", *variant)
    assert len(experiment.results(tmp_path / "search.jsonl")) == 1


def run(program: str, *arguments: object) -> None:
    command = [sys.executable, f"benchmarks/{program}", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
