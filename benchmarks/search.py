"""Which settings of a job learn most from the same number of forward passes, on a real model.

    python benchmarks/search.py --model "$(python examples/models.py smollm2)"                # places, then:
    python benchmarks/search.py --model DIR --variants "top-third; top-third, cosine; top-third, 64 rows"
    python benchmarks/search.py --model DIR --tasks trec --variants "all; top-third, cosine" --factors 1    # held out
    python benchmarks/search.py --report

A variant is a place, which says what is trained, and any number of tricks. All get the same passes (a row through all
layers once; a step that trains the upper third makes a third of one for each row and probe) and the same multiples of
the step size that learning_rate="auto" measures. What counts is the validation loss of the best multiple; the test rows
are left to experiment.py. Every run is a line of --output, so a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.experiment import BATCH, add_common, in_child, load, longest, missing, results, train

PLACES: dict[str, dict[str, Any]] = {
    "all": {},
    "top-third": {"target_layers": "top-third"},
    "last three": {"target_layers": "-3:"},
    "last": {"target_layers": "last"},
    "head": {"target_modules": "lm_head"},
}
TRICKS: dict[str, dict[str, Any]] = {
    "linear": {"lr_schedule": "linear"},
    "cosine": {"lr_schedule": "cosine"},
    "64 rows": {"batch_size": 64},
    "256 rows": {"batch_size": 256},
    "4 two-sided": {"method": {"queries": 4}},
    "4 one-sided": {"method": {"queries": 4, "estimator": "one-sided"}},
    "4 rloo": {"method": {"queries": 4, "estimator": "rloo"}},
    "momentum": {"method": {"optimizer": "momentum"}},
    "adam": {"method": {"optimizer": "adam"}},
    "meazo": {"method": {"optimizer": "meazo"}},
    "sign": {"method": {"optimizer": "sign"}},
    "muon": {"method": {"optimizer": "muon"}},
    "tezo": {"method": {"name": "tezo"}, "bases": 1},  # it refreshes none
    "subzero": {"method": {"name": "subzero"}},
    "rank 1": {"method": {"rank": 1}},
    "rank 4": {"method": {"rank": 4}},
    "interval 10": {"method": {"interval": 10}},
    "V measured": {"method": {"v": "activations", "u": "written"}},
    "3 bases": {"bases": 3},
    "15 bases": {"bases": 15},
    "31 bases": {"bases": 31},
    "eps 1e-4": {"method": {"eps": 1e-4}},
    "eps 3e-4": {"method": {"eps": 3e-4}},
    "eps 3e-3": {"method": {"eps": 3e-3}},
    "eps 1e-2": {"method": {"eps": 1e-2}},
    "attention": {"target_modules": "attention"},
    "mlp": {"target_modules": "mlp"},
}
EVALUATIONS = 2
SLOTS = {"slots": 5, "slot_rank": 64}
"""For a whole step of four one-sided directions, and for 31 bases of rank 2."""
BASES = 7
"""Of a variant that names no other number: what the default slot holds of rank 2."""
KEY = ("model", "task", "variant", "factor", "passes", "seed")


def options_of(variant: str) -> dict[str, Any]:
    """The options of `finetune` that a label such as "top-third, cosine, 64 rows" stands for."""
    from vllm_zo.methods import METHODS

    place, *tricks = variant.split(", ")
    options, method = dict(PLACES[place]), {"name": "lozo"}
    for trick in tricks:
        method |= TRICKS[trick].get("method", {})
        options |= {name: value for name, value in TRICKS[trick].items() if name != "method"}
    return {"batch_size": BATCH, "bases": BASES, **options, "method": METHODS.build(method)}


def steps_within(passes: int, options: dict[str, Any], layers: int, rows: int) -> int:
    """How many steps these passes pay for. The layers below the first trained one take each row once."""
    from vllm_zo.methods.layers import select_layers

    first = min(select_layers(options["target_layers"], layers)) if "target_layers" in options else 0
    batch, probes = options["batch_size"], len(options["method"].plan(0, 0, 0).probes)
    if options.get("target_modules") == "lm_head":  # all probes share what enters the head, which counts as a layer
        first, probes = layers - 1, 1
    in_epoch = batch * (first + probes * (layers - first)) / layers
    later = batch * probes * (layers - first) / layers
    epoch = rows / batch
    return int(min(passes / in_epoch, epoch) + max(0.0, passes - epoch * in_epoch) / later)


def child(args: argparse.Namespace, runs: list[tuple[str, str, float, int, int]]) -> None:
    from vllm_zo import LLM

    llm: Any = LLM(args.model, dtype=args.dtype, max_model_len=longest(args.model), zo_training=SLOTS)
    layers = llm.llm_engine.model_config.hf_config.num_hidden_layers
    for run in runs:
        name, variant, factor, passes, seed = run
        task, options = replace(load(args, name), test=[]), options_of(variant)
        steps = steps_within(passes, options, layers, len(task.train))
        result = train(llm, task, {**options, "learning_rate_multiplier": factor}, steps, seed, EVALUATIONS)
        line = {**dict(zip(KEY, (Path(args.model).name, *run), strict=True)), **result}
        with args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print({field: value for field, value in line.items() if field != "curve"}, flush=True)


def report(runs: Iterable[dict[str, Any]]) -> str:
    """A table for each model, task and number of passes, by the validation loss of each variant's best factor."""
    groups: dict[tuple[Any, ...], dict[tuple[str, int], list[dict[str, Any]]]] = {}
    for run in runs:
        group = groups.setdefault((run["model"], run["task"], run["passes"]), {})
        group.setdefault((run["variant"], run["seed"]), []).append(run)
    parts = []
    for (model, task, passes), group in groups.items():
        lines = [
            f"{task}, {model}, {passes} passes a run\n",
            "| variant | seed | steps | CPU seconds | validation loss by factor | loss | accuracy |",
            "|---" * 7 + "|",
        ]
        for (variant, seed), tried in sorted(group.items(), key=lambda item: loss_of(min(item[1], key=loss_of))):
            best = min(tried, key=loss_of)
            by_factor = ", ".join(f"{run['factor']:g}: {loss_of(run):.3f}" for run in tried)
            cells = [variant, seed, best["steps"], f"{best['spent']:.0f}", by_factor, f"{loss_of(best):.3f}"]
            cells += [f"{best['validation']['accuracy']:.3f}"] if "validation" in best else []
            lines.append(f"| {' | '.join(map(str, cells))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def loss_of(run: dict[str, Any]) -> float:
    """Of the validation rows; infinite where the run diverged."""
    return float(run["validation"]["loss"]) if "validation" in run else float("inf")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, "sst2", "search.jsonl")
    known = f"a place ({'; '.join(PLACES)}) and, with commas, tricks ({'; '.join(TRICKS)})"
    parser.add_argument(
        "--variants", default=list(PLACES), type=lambda s: [v.strip() for v in s.split(";")],
        help=f"separated by semicolons, each {known}",
    )  # fmt: skip
    parser.add_argument("--factors", default=[0.3, 1.0, 3.0], type=lambda s: [float(f) for f in s.split(",")])
    parser.add_argument("--passes", type=int, default=6400, help="rows through all layers, a run")
    args = parser.parse_args(argv)
    for variant in args.variants:
        place, *tricks = variant.split(", ")
        if place not in PLACES or not set(tricks) <= TRICKS.keys():
            parser.error(f"--variants {variant!r}: expected {known}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.report:
        runs = itertools.product(args.tasks, args.variants, args.factors, [args.passes], args.seeds)
        in_child("ours", child, args, missing(args, KEY, list(runs)))
    print(report(results(args.output)))


if __name__ == "__main__":
    main()
