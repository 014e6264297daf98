"""The wall clock of a long job with its evaluations, and a projection for 20,000 steps of it.

    python benchmarks/long_run.py --shape 1.3b --dtype float16 --steps 2000            # measured from end to end
    python benchmarks/long_run.py --shape 13b --dtype float16 --steps 350 --skip 50    # a steady window, projected

The model has random weights, the prompts have SST-2's lengths, and an evaluation has 500 examples. On a GPU the engine
runs where vLLM's environment says, by default in a process of its own. A projection is (steps x mean step + evaluations
x mean evaluation). The means leave out the first `--skip` steps, which still compile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts, gpu
from benchmarks.children import environment
from benchmarks.core_step import make_checkpoint
from benchmarks.options import add_device, add_model, choose_device
from benchmarks.shapes import OPTION_TEXTS, SHAPES, Prompts, title

PAPER_STEPS, PAPER_EVALUATIONS = 20_000, 5
"""LoZO's run on SST-2: an evaluation every 4,000 steps."""
VALIDATION_ROWS = 500


class Clock:
    """A callback of `finetune` that notes the seconds between records, for steps and evaluations separately.

    Args: now: what counts the seconds; `time.process_time` counts those of this process on all cores.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.steps: list[float] = []
        self.evaluations: list[float] = []
        self._now = now
        self.last = now()

    def __call__(self, run: Any, record: dict[str, Any]) -> None:
        now = self._now()
        (self.evaluations if "eval_loss" in record else self.steps).append(now - self.last)
        self.last = now


def measure(args: argparse.Namespace, model: str) -> dict[str, Any]:
    from vllm_zo import LLM, Classification, LoZO

    prompts = Prompts(SHAPES[args.shape].vocab, args.batch)
    options: dict[str, Any] = {}
    if args.device == "cuda":
        options = gpu.engine_options(model, map(prompts.tokens, range(min(args.steps, 1000))), 2 * args.batch)
    started = time.perf_counter()
    llm = LLM(model, dtype=args.dtype, zo_training=True, **options)
    clock, ready = Clock(), time.perf_counter()
    run = llm.finetune(
        train=prompts.records(),
        validation=prompts.records()[:VALIDATION_ROWS],
        objective=Classification(template="{sentence}", options=list(OPTION_TEXTS)),
        method=LoZO(rank=args.rank, interval=args.interval),
        learning_rate=1e-7,
        batch_size=args.batch,
        steps=args.steps,
        eval_interval=args.eval_interval,
        update_space=args.space,
        divergence_factor=None,  # random weights learn nothing, and noise must not stop the job
        callbacks=[clock],
        progress=False,
    )
    wall = time.perf_counter() - ready
    steady = clock.steps[args.skip :]
    evaluation = mean(clock.evaluations[1:] or clock.evaluations)
    return {
        "status": run.status,
        "start_s": ready - started,
        "wall_s": wall,
        "steps": len(clock.steps),
        "evaluations": len(clock.evaluations),
        "step_ms": {"median": 1e3 * median(steady), "mean": 1e3 * mean(steady)},
        "evaluation_s": evaluation,
        "projected_s": PAPER_STEPS * mean(steady) + PAPER_EVALUATIONS * evaluation,
        "seconds": clock.steps,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser, shape="1.3b", dtype="float16")
    parser.add_argument("--space", choices=("bank", "fold"), default="bank")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--interval", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--skip", type=int, default=50, help="first steps that the figures leave out")
    parser.add_argument("--eval-interval", type=int, default=500)
    add_device(parser)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args(argv)
    if args.skip >= args.steps:
        parser.error(f"--skip {args.skip}: must be less than --steps {args.steps}")
    choose_device(parser, args)
    cores = facts.chosen_cores(None, args.device)
    if args.device == "cpu":
        os.environ.update(environment("ours", cores))
    machine = facts.machine(cores) | {"gpu": args.card}
    with tempfile.TemporaryDirectory(prefix="long_run_") as scratch:
        result = measure(args, str(make_checkpoint(args, Path(scratch))))
    where = args.card["name"] if args.card else "the CPU"
    print(f"{title(args.shape)} {args.dtype}, batch {args.batch}, {args.space}, on {where}; {result['status']}")
    print(
        f"{result['steps']} steps and {result['evaluations']} evaluations of {VALIDATION_ROWS} rows: "
        f"{result['wall_s']:.1f} s after a start of {result['start_s']:.1f} s"
    )
    print(
        f"steady step: median {result['step_ms']['median']:.2f} ms, mean {result['step_ms']['mean']:.2f}; "
        f"an evaluation {result['evaluation_s']:.2f} s"
    )
    print(
        f"projected, {PAPER_STEPS} steps and {PAPER_EVALUATIONS} evaluations: {result['projected_s'] / 60:.1f} minutes"
    )
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"machine": machine, "settings": settings, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
