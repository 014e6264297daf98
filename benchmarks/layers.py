"""Milliseconds a step against the first trained layer: what the rows below it cost, and what keeping them saves.

    python benchmarks/layers.py --model "$(python examples/models.py smollm2)"            # layers 0, 10, 20 and 29
    python benchmarks/layers.py --model DIR --first 0,4,8 --rounds 5 --json layers.json

Each way trains the layers from a number on (`target_layers="20:"`): with the states below kept from step to step; with
an empty budget, so that they are computed at every step, once for all probes; and with every probe computing every
layer, as without this. `head` as a first layer trains the LM head alone. The ways take turns. A figure is the median
over the steps after the first epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
REVIEWS = ROOT / "examples" / "demo" / "reviews" / "train.jsonl"
WAYS = ("kept", "once a step", "every probe")
BATCH, BATCHES = 16, 4


def take_steps(llm: Any, rows: list[Any], first: str, way: str, steps: int) -> tuple[list[float], float]:
    """Milliseconds of the steps after the first epoch, and the MiB that were kept."""
    from vllm_zo import Classification

    pruner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.zo.platform.rows
    limit, decoder = pruner.kept.limit_bytes, pruner.decoder
    pruner.kept.clear()  # of what the last turn has left
    if way == "once a step":
        pruner.kept.limit_bytes = 0
    elif way == "every probe":
        pruner.decoder = None
    scope = {"target_modules": "lm_head"} if first == "head" else {"target_layers": f"{first}:"}
    most = 0
    ends: list[float] = []

    def note(run: Any, record: dict[str, Any]) -> None:
        nonlocal most
        most = max(most, pruner.kept.bytes)
        ends.append(record["seconds"])

    try:
        llm.finetune(
            rows, objective=Classification("{sentence} It was", [" terrible", " great"]), learning_rate=1e-7,
            batch_size=BATCH, steps=BATCHES + 1 + steps, callbacks=[note], progress=False, **scope,
        )  # fmt: skip
    finally:
        pruner.kept.limit_bytes, pruner.decoder = limit, decoder
    return [1e3 * (b - a) for a, b in zip(ends[BATCHES:], ends[BATCHES + 1 :], strict=False)], most / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, default=REVIEWS, help="jsonl with `sentence` and `label`")
    parser.add_argument("--first", default="0,10,20,29", help="first trained layers, or `head`")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=8, help="measured steps a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the ways are switched in the worker
    from vllm_zo import apply_cpu_defaults

    apply_cpu_defaults()
    from benchmarks import facts
    from vllm_zo import LLM

    rows = [json.loads(line) for line in args.data.read_text().splitlines()[: BATCH * BATCHES]]
    llm = LLM(args.model, dtype=args.dtype, max_model_len=256, zo_training=True)
    tokens = sum(len(llm.get_tokenizer()(row["sentence"] + " It was").input_ids) for row in rows) / len(rows)
    times: dict[tuple[str, str], list[float]] = {}
    kept: dict[str, float] = {}
    for turn in range(args.rounds + 1):  # the first one warms up
        for first in args.first.split(","):
            for way in WAYS if first != "0" else WAYS[-1:]:
                taken, mib = take_steps(llm, rows, first, way, args.steps)
                if turn:
                    times.setdefault((first, way), []).extend(taken)
                if way == "kept":
                    kept[first] = mib
    print(f"{args.model}, {llm.llm_engine.model_config.dtype}, batch {BATCH}, {tokens:.1f} tokens a prompt")
    print(f"| first trained layer | {' | '.join(WAYS)} | MiB kept for {len(rows)} rows |")
    print("|---|" + "---|" * (len(WAYS) + 1))
    for first in args.first.split(","):
        cells = [f"{statistics.median(times[first, way]):.0f}" if (first, way) in times else "" for way in WAYS]
        print(f"| {first} | {' | '.join(cells)} | {f'{kept[first]:.1f}' if first in kept else ''} |")
    if args.json:
        found = {f"{first} {way}": ms for (first, way), ms in times.items()}
        args.json.write_text(
            json.dumps({"machine": facts.machine(facts.chosen_cores(None)), "ms": found, "kept_mib": kept}, indent=1)
        )


if __name__ == "__main__":
    main()
