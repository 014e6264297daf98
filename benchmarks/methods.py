"""Accuracy against forward passes: every method has the same budget and an equally small search of its step size.

    python benchmarks/methods.py --data ../shared/data --model examples/demo/model       # all, some hours on 2 cores
    python benchmarks/methods.py --tasks sst2 --budget 1000 --methods "lozo; fzoo" --factors 1,3
    python benchmarks/methods.py --seeds 3 --methods "lozo; fzoo; eggroll"         # more seeds of the best step size
    python benchmarks/methods.py --report --plot methods.png        # tables and plot of what is there

A forward pass is one probe of one mini-batch. A two-sided step of one direction costs 2, FZOO's step with 8 directions
costs 9. Each method gets the same multiples of the step size that `learning_rate="auto"` measures. The report has the
test figures of the multiple with the lowest validation loss. Every run is a line of --output, so a second call goes on
where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

BATCH, EVALUATIONS = 16, 8
METHODS: dict[str, dict[str, Any]] = {
    "lozo": {"name": "lozo"},
    "lozo, one-sided x4": {"name": "lozo", "queries": 4, "estimator": "one-sided"},
    "lozo, rloo x4": {"name": "lozo", "queries": 4, "estimator": "rloo"},
    "lozo-m": {"name": "lozo", "optimizer": "momentum"},
    "lozo, adam": {"name": "lozo", "optimizer": "adam"},
    "lozo, meazo": {"name": "lozo", "optimizer": "meazo"},
    "lozo, sign": {"name": "lozo", "optimizer": "sign"},
    "fzoo": {"name": "fzoo"},
    "kerzoo": {"name": "kerzoo"},
    "eggroll": {"name": "eggroll"},
    "factorized-mezo": {"name": "factorized-mezo", "rank": 16},
    "tezo": {"name": "tezo"},
    "subzero": {"name": "subzero"},
    "zo-muon": {"name": "zo-muon"},
    "lora-fa": {"name": "lora-fa"},
    "mezo-lora": {"name": "mezo-lora"},
}
"""Label -> the method as in JSON."""


def run_once(llm: Any, task: Any, label: str, factor: float, budget: int, seed: int) -> dict[str, Any]:
    """Take one run within the budget. Returns its line, with the validation curve and the test figures."""
    from vllm_zo import methods
    from vllm_zo.errors import JobError

    method = methods.METHODS.build(METHODS[label])
    passes = len(method.plan(0, 0, 0).probes)
    steps = budget // passes
    line: dict[str, Any] = {"task": task.name, "method": label, "factor": factor, "budget": budget, "seed": seed}
    # CPU seconds: they vary less than wall time when other programs run. The engine is in this process.
    start = time.process_time()
    try:
        run = llm.finetune(
            task.train, task.validation, objective=task.objective, method=method, batch_size=BATCH,
            learning_rate_multiplier=factor, steps=steps, seed=seed, eval_interval=max(1, steps // EVALUATIONS),
            progress=False,
        )  # fmt: skip
    except JobError as error:  # a run that diverged is a result too
        print(f"{label} at {factor:g}: {error}", file=sys.stderr)
        return line | {"loss": None, "seconds": time.process_time() - start}
    seconds = time.process_time() - start
    best = min(run.evaluations, key=lambda e: e["eval_loss"])
    last = run.evaluations[-1]
    test = llm.evaluate(task.test, run=run)
    if run.config.space == "fold":  # `test` measured the last state: fold can give back no earlier one
        best = last
        llm.restore_base(run)
    curve = [[e["step"] * passes, e["eval_loss"], e["eval_accuracy"]] for e in run.evaluations]
    return line | {
        "loss": best["eval_loss"], "accuracy": best["eval_accuracy"], "test": test["accuracy"], "seconds": seconds,
        "steps": steps, "passes": passes, "curve": curve, "rate": run.history[-1]["learning_rate"],
    }  # fmt: skip


def wanted(args: argparse.Namespace, done: list[dict[str, Any]]) -> Iterable[tuple[str, str, float, int]]:
    """(task, method, factor, seed) of the missing runs: first the search, then more seeds of its best factor."""
    have = {(d["task"], d["method"], d["factor"], d["budget"], d["seed"]) for d in done}
    for task in args.tasks:
        for label in args.methods:
            runs = [(factor, 0) for factor in args.factors]
            found = [d for d in done if (d["task"], d["method"], d["budget"]) == (task, label, args.budget)]
            if args.seeds > 1 and (best := best_of(found)):
                runs += [(best["factor"], seed) for seed in range(1, args.seeds)]
            for factor, seed in runs:
                if (task, label, factor, args.budget, seed) not in have:
                    yield task, label, factor, seed


def best_of(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The run of seed 0 with the lowest validation loss."""
    finished = [r for r in runs if r["loss"] is not None and r["seed"] == 0]
    return min(finished, key=lambda r: r["loss"], default=None)


def report(done: list[dict[str, Any]]) -> str:
    """One table per task, by validation loss, with the figures for the measured step size and for its best multiple."""
    parts = []
    for task, budget in dict.fromkeys((d["task"], d["budget"]) for d in done):
        runs = [d for d in done if (d["task"], d["budget"]) == (task, budget)]
        zero = next(d["curve"][0] for d in runs if d["loss"] is not None)
        lines = [
            f"{task}, {budget} forward passes a run; zero-shot validation loss {zero[1]:.3f}, accuracy {zero[2]:.3f}; "
            "three numbers are validation loss, validation accuracy, test accuracy",
            "",
            '| method | passes a step | steps | with "auto" | best tried | x auto | test accuracy over seeds |',
            "|---|---|---|---|---|---|---|",
        ]
        bests = [best_of([d for d in runs if d["method"] == label]) for label in METHODS]
        for best in sorted((b for b in bests if b), key=lambda b: b["loss"]):
            same = [d for d in runs if d["method"] == best["method"] and d["loss"] is not None]
            plain = next((shown(d) for d in same if d["factor"] == 1.0 and d["seed"] == 0), "diverged")
            tests = [d["test"] for d in same if d["factor"] == best["factor"]]
            mean = f"{sum(tests) / len(tests):.3f} ({min(tests):.3f} to {max(tests):.3f}, {len(tests)} seeds)"
            cells = [best["method"], best["passes"], best["steps"], plain, shown(best), f"{best['factor']:g}"]
            lines.append(f"| {' | '.join(map(str, cells))} | {mean if len(tests) > 1 else ''} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def shown(run: dict[str, Any]) -> str:
    return f"{run['loss']:.3f} / {run['accuracy']:.3f} / {run['test']:.3f}"


def plot(done: list[dict[str, Any]], path: Path) -> None:
    """Draw validation loss against forward passes for the best run of each method, one panel per task."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(d["task"] for d in done))
    figure = Figure(figsize=(7.5 * len(tasks), 5), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        bests = [best_of([d for d in done if (d["task"], d["method"]) == (task, label)]) for label in METHODS]
        for index, best in enumerate(sorted((b for b in bests if b), key=lambda b: b["loss"])):
            passes, losses, _ = zip(*best["curve"], strict=True)
            axis.plot(passes, losses, label=best["method"], color=f"C{index % 10}", linestyle="-:"[index >= 10])
        axis.set(title=task, xlabel="forward passes (probes of one mini-batch)", ylabel="validation loss")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples" / "demo" / "model"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="holds sst2/ and trec/")
    parser.add_argument("--tasks", default="sst2,trec", type=lambda s: s.split(","))
    parser.add_argument("--methods", default=list(METHODS), type=lambda s: [m.strip() for m in s.split(";")],
                        help="labels, separated by semicolons")  # fmt: skip
    parser.add_argument("--budget", type=int, default=4000, help="forward passes a run")
    parser.add_argument("--factors", default=[0.3, 1.0, 3.0], type=lambda s: [float(f) for f in s.split(",")],
                        help="multiples of the measured step size that each method gets")  # fmt: skip
    parser.add_argument("--rows", type=int, nargs=3, default=(1000, 200, 500), metavar=("TRAIN", "DEV", "TEST"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "methods.jsonl")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    if unknown := [m for m in args.methods if m not in METHODS]:
        parser.error(f"unknown method {unknown[0]!r}: choose from {'; '.join(METHODS)}")
    return args


def main() -> None:
    args = parse()
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    if not args.report and not args.data.exists():
        raise SystemExit(f"skipped: no data in {args.data}; give --data DIR with sst2/train.jsonl and the like")
    todo = [] if args.report else list(wanted(args, done))
    if todo:
        from vllm_zo import apply_cpu_defaults

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, whose CPU seconds are shown
        apply_cpu_defaults()
        from vllm_zo import LLM
        from vllm_zo.tasks import load_task

        tasks = {name: load_task(name, args.data / name, 0, *args.rows) for name in args.tasks}
        # 9 slots hold a whole step of FZOO, the method with the most probes: 8 directions and the centre.
        llm = LLM(args.model, max_model_len=256, dtype="float32", zo_training={"slots": 9, "slot_rank": 32})
        args.output.parent.mkdir(parents=True, exist_ok=True)
        for task, label, factor, seed in todo:
            result = run_once(llm, tasks[task], label, factor, args.budget, seed)
            done.append(result)
            with args.output.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print({k: v for k, v in result.items() if k != "curve"}, flush=True)
    if done:
        print(report(done))
        if args.plot:
            plot(done, args.plot)


if __name__ == "__main__":
    main()
