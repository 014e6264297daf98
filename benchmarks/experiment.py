"""What a pretrained model learns from a task: zeroth-order jobs, in-context learning and back-propagation.

    python benchmarks/experiment.py --model "$(python examples/models.py smollm2)"            # all: hours on a core
    python benchmarks/experiment.py --model DIR --tasks sst2 --contenders "bank; lora" --cpu-seconds 300
    python benchmarks/experiment.py --report                                    # tables of what is there

Each trainer gets the same CPU seconds for its steps, on one thread: they do not depend on who else uses the machine, as
wall clock does. Evaluations and the start are not in them, but for a job that measures its V the pass that does is. A
short job says first how many steps that is. All have the same training, validation and test rows, the papers' prompts
(vllm_zo/tasks), the loss of the task's objective, and batches in the same order. `bank` and `lora` give back the state
of their best evaluation, `fold` the last.

`lora` goes on to LONGER times the seconds, as a line of its own. Every result is a line of --output, so a second call
goes on where the first one stopped. Contenders in the engine take turns in one process, LoRA has its own; name one
contender alone where its peak of memory matters.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts
from benchmarks.children import variables_of
from benchmarks.long_run import Clock
from benchmarks.memory import MIB, peak_rss, reset_peak

ROOT = Path(__file__).parents[1]
BATCH, EVALUATIONS, LONGER = 16, 4, 2
PILOT_EPOCH, PILOT_STEPS = 3, 8
MAX_LEN = 4096
"""Tokens of the longest sequence: 16 demonstrations of RTE and a question."""

PROMPTED = {"zero-shot": 0, "8 demonstrations": 8, "16 demonstrations": 16}
"""Contenders that learn nothing: how many solved training rows stand in front of a question."""
HEAD = {"target_modules": "lm_head", "bases": 31, "batch_size": 64, "lr_schedule": "linear"}
JOBS: dict[str, dict[str, Any]] = {
    "lozo": {"update_space": "fold"},
    "lozo, last layer": {"update_space": "fold", "target_layers": "last"},
    "bank": {"bases": 7},
    "bank, top third": {"target_layers": "top-third", "bases": 7},
    "bank, last layer": {"target_layers": "last", "bases": 7},
    "bank, LM head": HEAD,
    "bank, LM head, V measured": {
        **HEAD,
        "method": {"name": "lozo", "v": "activations", "u": "written", "interval": 10},
    },
}
"""Contenders that the engine trains: the options of `finetune` that are not its defaults. `lozo` is as published. Seven
bases are the default of an engine whose slots have their default rank."""
SLOTS = {"slot_rank": 64}
"""Of every engine: 31 bases of rank 2 fit."""
LORA = "lora"
TASKS = ("sst2", "rte", "trec", "cb", "copa")
CONTENDERS = (*PROMPTED, *JOBS, LORA)
KEY = ("model", "task", "contender", "cpu_seconds", "seed")


# --- in the engine ----------------------------------------------------------------------------------------------------


def steps_for(llm: Any, task: Any, options: dict[str, Any], cpu_seconds: float) -> int:
    """How many steps of a job these seconds pay for, by a short job that changes nothing.

    The first epoch is measured apart: with `target_layers` it computes the layers below, and later ones do not. Where V
    is measured, the pass for it has done that before the first step.
    """
    batch = options.get("batch_size", BATCH)
    clock = Clock(time.process_time)
    pilot = {**options, "batch_size": batch, "learning_rate": 0.0, "lr_schedule": "constant"}
    run = llm.finetune(
        task.train[: batch * PILOT_EPOCH], objective=task.objective, steps=PILOT_EPOCH + PILOT_STEPS,
        callbacks=[clock], progress=False, **pilot,
    )  # fmt: skip
    restore(llm, run)
    first, later = mean(clock.steps[1:PILOT_EPOCH]), median(clock.steps[PILOT_EPOCH + 1 :])
    epoch = math.ceil(len(task.train) / batch)
    if measures(options):
        return max(1, int((cpu_seconds - clock.steps[0] * epoch / PILOT_EPOCH) / later))
    left = cpu_seconds - epoch * first
    return max(1, int(epoch + left / later if left > 0 else cpu_seconds / first))


def measures(options: dict[str, Any]) -> bool:
    """Whether the base passes over the rows before the first step."""
    method = options.get("method")
    return isinstance(method, dict) and not {"u", "v"}.isdisjoint(method)


def spent(clock: Clock, options: dict[str, Any], steps: int | None = None) -> float:
    """CPU seconds of the first `steps` steps, and where the base passes over the rows first, of that pass and the first
    evaluation."""
    before = clock.evaluations[0] if measures(options) and clock.evaluations else 0.0
    return before + sum(clock.steps[:steps])


def forget_states(worker: Any) -> None:
    """Drop what earlier jobs have kept of the rows, in an engine's worker, or a later job would find its work done."""
    worker.zo.platform.forget_states()


def restore(llm: Any, run: Any) -> None:
    if run.config.space == "fold":
        llm.restore_base(run)


def train(
    llm: Any,
    task: Any,
    options: dict[str, Any],
    steps: int,
    seed: int,
    evaluations: int = EVALUATIONS,
    cpu_seconds: float = math.inf,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Run a job, and measure what it gives back on the test rows, if there are any.

    Args:
        steps: how many it takes, or about how many it takes in `cpu_seconds`, where it stops. What other programs do
            to a core changes what a step takes, so without a schedule it may take twice as many.
        evaluations: on the validation rows, besides the one before the first step.
    """
    from vllm_zo.errors import JobError

    clock = Clock(time.process_time)

    def stop(run: Any, record: dict[str, Any]) -> None:
        if spent(clock, options) >= cpu_seconds:
            run.stop()

    most = steps if math.isinf(cpu_seconds) or "lr_schedule" in options else 2 * steps
    llm.collective_rpc(forget_states)
    reset_peak()
    try:
        run = llm.finetune(
            task.train, task.validation, objective=task.objective, steps=most, seed=seed,
            callbacks=[clock, *callbacks, stop], eval_interval=max(1, math.ceil(steps / evaluations)), progress=False,
            **{"batch_size": BATCH, **options},
        )  # fmt: skip
    except JobError as error:  # a run that diverged is a result too
        return {"diverged": str(error), "steps": len(clock.steps), "spent": spent(clock, options)}
    peak = peak_rss()
    # `fold` can give back no earlier state than its last.
    given_back = run.evaluations[-1] if run.config.space == "fold" else min(run.evaluations, key=validation_loss)
    tested = {"test": figures(llm.evaluate(task.test, task.final_objective, run=run))} if task.test else {}
    restore(llm, run)
    return {
        "steps": len(clock.steps), "spent": spent(clock, options), "tokens": run.history[-1]["tokens"],
        "rate": max(step["learning_rate"] for step in run.history), "peak_mib": peak / MIB,
        "validation": figures(given_back, "eval_"), **tested,
        "curve": [
            {"step": e["step"], "spent": spent(clock, options, e["step"]), **figures(e, "eval_")}
            for e in run.evaluations
        ],
    }  # fmt: skip


def validation_loss(evaluation: Any) -> float:
    return float(evaluation["eval_loss"])


def figures(scores: Any, prefix: str = "") -> dict[str, float]:
    return {name: float(scores[prefix + name]) for name in ("loss", "accuracy")}


def prompted(llm: Any, task: Any, count: int) -> dict[str, Any]:
    """Answer the validation and test rows behind `count` solved training rows."""
    reset_peak()
    shown = with_demonstrations(task, count, llm.get_tokenizer()) if count else task
    began = time.process_time()
    test = llm.evaluate(shown.test, shown.objective)
    spent = time.process_time() - began
    validation = llm.evaluate(shown.validation, shown.objective)
    return {
        "steps": 0, "spent": 0.0, "test_spent": spent, "peak_mib": peak_rss() / MIB,
        "validation": figures(validation), "test": figures(test),
    }  # fmt: skip


def with_demonstrations(task: Any, count: int, tokenizer: Any) -> Any:
    """The task with `count` training rows and their answers in front of every prompt, the classes in turns."""
    objective = task.objective
    text = "\n\n".join(answered(objective.encode(row, tokenizer, "train"), tokenizer) for row in mixed(task, count))
    rows = {part: [{**row, "shown": text} for row in getattr(task, part)] for part in ("validation", "test")}
    return replace(task, objective=replace(objective, template="{shown}\n\n" + objective.template), **rows)


def mixed(task: Any, count: int) -> list[dict[str, Any]]:
    """The first training rows, each class in its turn."""
    classes: dict[Any, list[dict[str, Any]]] = {}
    for row in task.train:
        classes.setdefault(row[task.objective.label_field], []).append(row)
    longest = max(map(len, classes.values()))
    ordered = [rows[place] for place in range(longest) for rows in classes.values() if place < len(rows)]
    return ordered[:count]


def answered(example: Any, tokenizer: Any) -> str:
    """An encoded example as text, with its right answer."""
    one_for_each = len(example.sequences) > 1
    sequence = example.sequences[example.gold if one_for_each else 0]
    last = sequence.label_ids[-1 if one_for_each else example.gold]
    text: str = tokenizer.decode([*sequence.token_ids, last], skip_special_tokens=True)
    return text


# --- back-propagation -------------------------------------------------------------------------------------------------


def train_lora(args: argparse.Namespace, task: Any, seed: int) -> Iterator[dict[str, Any]]:
    """LoRA after --cpu-seconds and after LONGER times as many: each time its best state so far."""
    import torch
    from transformers import AutoTokenizer

    from benchmarks.baselines.lora_backprop import LoraTrainer
    from vllm_zo.data.batches import BatchOrder

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = LoraTrainer(args.model, getattr(torch, args.lora_dtype), (), checkpointing=False, device="cpu")
    rows = {part: encoded(task, part, tokenizer) for part in ("train", "validation", "test")}
    order = BatchOrder(len(rows["train"]), BATCH, seed)
    curve = [{"step": 0, **trainer.evaluate(task.objective, rows["validation"])}]
    best, kept, steps, spent = curve[0], copies(trainer.trained), 0, 0.0
    reset_peak()
    for mark in range(1, EVALUATIONS * LONGER + 1):
        while spent < args.cpu_seconds * mark / EVALUATIONS:
            began = time.process_time()
            trainer.learn(task.objective, [rows["train"][index] for index in order.batch(steps)])
            spent += time.process_time() - began
            steps += 1
        peak = peak_rss()
        curve.append({"step": steps, **trainer.evaluate(task.objective, rows["validation"])})
        if curve[-1]["loss"] < best["loss"]:
            best, kept = curve[-1], copies(trainer.trained)
        if mark in (EVALUATIONS, EVALUATIONS * LONGER):
            now = copies(trainer.trained)
            put(trainer.trained, kept)
            test = trainer.evaluate(task.objective, rows["test"])
            put(trainer.trained, now)
            yield {
                "contender": LORA if mark == EVALUATIONS else f"{LORA}, {LONGER} times as long",
                "steps": steps, "spent": spent, "peak_mib": peak / MIB, "validation": figures(best),
                "test": figures(test), "curve": curve.copy(),
            }  # fmt: skip


def encoded(task: Any, part: str, tokenizer: Any) -> list[Any]:
    from vllm_zo.data.encode import encode_examples

    return encode_examples(getattr(task, part), task.objective, tokenizer, MAX_LEN, part)


def longest(model: str) -> int:
    """The tokens of a request: MAX_LEN, or what the model has positions for."""
    from transformers import AutoConfig

    return min(MAX_LEN, AutoConfig.from_pretrained(model).max_position_embeddings)


def copies(parameters: Sequence[Any]) -> list[Any]:
    return [parameter.detach().clone() for parameter in parameters]


def put(parameters: Sequence[Any], values: Sequence[Any]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


# --- processes --------------------------------------------------------------------------------------------------------


def engine_child(args: argparse.Namespace, cells: list[tuple[str, str, float, int]]) -> None:
    from vllm_zo import LLM

    llm = LLM(args.model, dtype=args.dtype, max_model_len=longest(args.model), zo_training=SLOTS)
    for name, contender, _, seed in cells:
        task = load(args, name)
        if contender in PROMPTED:
            result = prompted(llm, task, PROMPTED[contender])
        else:
            steps = steps_for(llm, task, JOBS[contender], args.cpu_seconds)
            result = train(llm, task, JOBS[contender], steps, seed, cpu_seconds=args.cpu_seconds)
        write(args, name, seed, {"contender": contender, "dtype": args.dtype, **result})


def lora_child(args: argparse.Namespace, cells: list[tuple[str, str, float, int]]) -> None:
    for name, _, _, seed in cells:
        for result in train_lora(args, load(args, name), seed):
            write(args, name, seed, {"dtype": args.lora_dtype, **result})


def load(args: argparse.Namespace, name: str) -> Any:
    from vllm_zo.tasks import load_task

    return load_task(name, args.data / name, 0, *args.rows)


def check_data(args: argparse.Namespace) -> None:
    if not args.data.exists():
        raise SystemExit(f"skipped: no data in {args.data}; give --data DIR with sst2/train.jsonl and the like")


def write(args: argparse.Namespace, task: str, seed: int, result: dict[str, Any]) -> None:
    line = {"model": Path(args.model).name, "task": task, "cpu_seconds": args.cpu_seconds, "seed": seed, **result}
    with args.output.open("a") as file:
        file.write(json.dumps({**line, "rows": args.rows, "cpu": facts.machine([])["cpu"]}) + "\n")
    print({name: value for name, value in line.items() if name != "curve"}, flush=True)


def cells_of(args: argparse.Namespace) -> list[tuple[str, str, float, int]]:
    """(task, contender, CPU seconds, seed) of the results that are wanted. What learns nothing has one seed."""
    return [
        (task, contender, args.cpu_seconds, seed)
        for task in args.tasks
        for seed in args.seeds
        for contender in args.contenders
        if contender not in PROMPTED or seed == args.seeds[0]
    ]


def missing(args: argparse.Namespace, key: Sequence[str], cells: Sequence[Any]) -> list[Any]:
    """Those cells that have no line in --output yet. key: names the model and then the parts of a cell in a line."""
    model, done = Path(args.model).name, {tuple(line[name] for name in key) for line in results(args.output)}
    return [cell for cell in cells if (model, *cell) not in done]


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def in_child(name: str, target: Any, args: argparse.Namespace, cells: Sequence[Any]) -> None:
    """Run the cells in a process whose libraries have one thread."""
    if not cells:
        return
    check_data(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with variables_of(name, sorted(os.sched_getaffinity(0))[:1]):
        process = multiprocessing.get_context("spawn").Process(target=target, args=(args, cells))
        process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name} failed; see above")


# --- the table --------------------------------------------------------------------------------------------------------


def report(found_lines: Iterable[dict[str, Any]]) -> str:
    """A table for each model, task and number of seconds; contenders by test accuracy, seeds as lines of their own."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in found_lines:
        groups.setdefault((line["model"], line["task"], line["cpu_seconds"]), []).append(line)
    parts = []
    for (model, task, seconds), found in groups.items():
        train_rows, validation, test = found[0]["rows"]
        rows = sorted(found, key=lambda line: -line["test"]["accuracy"] if "test" in line else 0)
        heading = (
            f"{task}, {model}, {seconds:g} CPU seconds, {found[0]['cpu']}; at most {train_rows} training, {validation} "
            f"validation and {test} test rows"
        )
        columns = [
            "",
            "seed",
            "type",
            "steps",
            "CPU seconds",
            "validation loss",
            "accuracy",
            "test accuracy",
            "peak MiB",
        ]
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *map(row, rows)]
        parts.append(f"{heading}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def row(line: dict[str, Any]) -> str:
    numbers = ["diverged", "", "", ""]
    if "test" in line:
        scores = line["validation"]["loss"], line["validation"]["accuracy"], line["test"]["accuracy"]
        numbers = [*(f"{value:.3f}" for value in scores), f"{line['peak_mib']:.0f}"]
    cells = [line["contender"], line["seed"], line["dtype"], line["steps"], f"{line['spent']:.0f}", *numbers]
    return f"| {' | '.join(map(str, cells))} |"


def add_common(parser: argparse.ArgumentParser, tasks: str, output: str) -> None:
    """Add the options that search.py has too."""
    parser.add_argument("--model", default=str(ROOT / "examples" / "demo" / "model"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="a folder for each task")
    parser.add_argument("--tasks", default=tasks.split(","), type=lambda s: s.split(","))
    parser.add_argument("--seeds", default=[0], type=lambda s: [int(seed) for seed in s.split(",")])
    parser.add_argument("--rows", type=int, nargs=3, default=(1000, 200, 500), metavar=("TRAIN", "DEV", "TEST"))
    parser.add_argument("--dtype", default="auto", help="of the engine")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / output)
    parser.add_argument("--report", action="store_true", help="run nothing")


def add_contenders(parser: argparse.ArgumentParser, known: Iterable[str]) -> None:
    """Add --contenders: some of `known`, or all."""
    names = list(known)

    def some(text: str) -> list[str]:
        wanted = [name.strip() for name in text.split(";")]
        if unknown := [name for name in wanted if name not in names]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: choose from {'; '.join(names)}")
        return wanted

    parser.add_argument("--contenders", default=names, type=some, help=f"separated by semicolons: {'; '.join(names)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, ",".join(TASKS), "experiment.jsonl")
    add_contenders(parser, CONTENDERS)
    parser.add_argument("--cpu-seconds", type=float, default=400.0, help="for the steps of a trainer")
    parser.add_argument("--lora-dtype", default="float32")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.report:
        cells = missing(args, KEY, cells_of(args))
        in_child("ours", engine_child, args, [cell for cell in cells if cell[1] != LORA])
        in_child(LORA, lora_child, args, [cell for cell in cells if cell[1] == LORA])
    print(report(results(args.output)))


if __name__ == "__main__":
    main()
