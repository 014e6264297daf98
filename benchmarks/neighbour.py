"""What a busy process of somebody else's costs a job: the time of a step beside it and without it, taking turns.

    python benchmarks/neighbour.py                                        # the 7M shape, float32
    python benchmarks/neighbour.py --shape 125m --seconds 20 --rounds 5

The busy process counts in a loop, on whichever core the system gives it. A fair system would give n cores with n + 1
busy threads in equal parts: on two cores a step would then take 1.5 times as long. The engine is what
`LLM(..., zo_training=True)` starts by default, a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts
from benchmarks.shapes import OPTION_TEXTS, SHAPES, Prompts, write_checkpoint

SETTLE_S = 1.0
"""After a neighbour has come or gone, before steps count."""
STEPS = 1_000_000
"""More than any run takes; it is cancelled."""


def step_ms(run: Any, seconds: float, neighbours: int) -> float:
    """The median time of the steps that end within `seconds`, beside that many busy processes, in milliseconds."""
    with ExitStack() as stack:
        for _ in range(neighbours):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        time.sleep(SETTLE_S)
        run.poll()
        first = len(run.history)
        time.sleep(seconds)
        run.poll()
    ends = [record["seconds"] for record in run.history[first:]]
    if len(ends) < 3:
        raise RuntimeError(f"{len(ends)} steps within {seconds} s: choose more --seconds")
    return 1e3 * (ends[-1] - ends[0]) / (len(ends) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--neighbours", type=int, default=1, help="busy processes")
    parser.add_argument("--seconds", type=float, default=8, help="of a window")
    parser.add_argument("--rounds", type=int, default=4, help="windows of each kind")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from vllm_zo import LLM, Classification

    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(SHAPES[args.shape], args.dtype, directory)
        llm = LLM(directory, dtype=args.dtype, max_model_len=256, zo_training=True)
        run = llm.finetune(
            Prompts(SHAPES[args.shape].vocab, args.batch_size).records(),
            objective=Classification("{sentence}", list(OPTION_TEXTS)), learning_rate=1e-7,
            batch_size=args.batch_size, steps=STEPS, wait=False, progress=False,
        )  # fmt: skip
        step_ms(run, args.seconds, 0)  # the first steps warm up
        times: dict[int, list[float]] = {0: [], args.neighbours: []}
        for _ in range(args.rounds):
            for neighbours, taken in times.items():
                taken.append(step_ms(run, args.seconds, neighbours))
        run.cancel()
    alone, beside = times[0], times[args.neighbours]
    ratios = [b / a for a, b in zip(alone, beside, strict=True)]
    print(f"| {args.shape}, {args.dtype}, batch {args.batch_size} | ms a step (range) | |\n|---|---|---|")
    for name, taken in ("alone", alone), (f"beside {args.neighbours} busy", beside):
        print(f"| {name} | {statistics.median(taken):.0f} ({min(taken):.0f}-{max(taken):.0f}) | |")
    print(f"| ratio | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | |")
    if args.json:
        found = {"machine": facts.machine(facts.chosen_cores(None)), "alone_ms": alone, "beside_ms": beside}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
