"""Where the time of our steps goes, and how it grows with directions and with the batch.

    python benchmarks/step_anatomy.py --dtype float32 --json anatomy.json

One engine gives three tables. Its core runs in this process, and a clock times its worker at the borders of phases:

    phases       materialise, forward, score, update, host: median ms per step and share of the step
    directions   ms per step and per direction with K directions in one group
    batch        ms per step and per example, batch 16 to 128

The configurations of the last two take turns, round by round; figures are medians over the steps of all rounds.

On a GPU the host only queues work. So the steps of the phases table wait for the device at every border, which undoes
the overlap. Its phases add up to more than a step, whose time comes from runs without waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts, gpu
from benchmarks.children import environment
from benchmarks.core_step import make_checkpoint
from benchmarks.options import add_device, add_model, choose_device
from benchmarks.shapes import OPTION_TEXTS, SHAPES, Prompts, title

PHASES = ("materialise", "forward", "score", "update", "sample", "host")
DIRECTIONS = {"cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8, 16)}
BATCHES = (16, 32, 64, 128)


class PhaseClock:
    """It adds up the seconds of each phase since the last `take`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.start = time.perf_counter()
        self.finish: Callable[[], None] | None = None
        """A function that waits for the device at the borders of a phase. None does not wait."""

    def now(self) -> float:
        if self.finish is not None:
            self.finish()
        return time.perf_counter()

    def wrap(self, owner: Any, name: str, phase: Callable[..., str]) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[phase(*args)] += self.now() - start

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """The milliseconds of each phase. `host` is the rest of the step, in which no phase of the worker ran."""
        now = time.perf_counter()
        taken = {phase: 1e3 * self.seconds[phase] for phase in PHASES[:-1]}
        taken["step"] = 1e3 * (now - self.start)
        taken["host"] = taken["step"] - sum(taken[phase] for phase in PHASES[:-1])
        self.seconds.clear()
        self.start = now
        return taken


def attach_clock(llm: Any) -> PhaseClock:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    clock = PhaseClock()
    clock.wrap(worker.model_runner, "execute_model", lambda *_: "forward")
    clock.wrap(worker.zo.platform, "forward_alone", lambda *_: "forward")
    prepare = worker.zo.platform.forward_alone

    def prepared(*args: Any) -> Any:
        forward = prepare(*args)
        clock.wrap(forward, "go_on", lambda *_: "forward")
        return forward

    worker.zo.platform.forward_alone = prepared
    clock.wrap(worker.model_runner, "sample_tokens", lambda *_: "sample")
    clock.wrap(worker.zo, "score", lambda *_: "score")
    updates = ("CloseGroup", "Fold")
    clock.wrap(worker.zo, "execute", lambda cmd: "update" if type(cmd).__name__ in updates else "materialise")
    return clock


def take_steps(llm: Any, clock: PhaseClock, args: argparse.Namespace, batch: int, queries: int) -> list[dict[str, Any]]:
    """The phases of each step of a job, without its first steps, which meet new slots and a new batch size."""
    from vllm_zo import Classification, LoZO

    taken: list[dict[str, Any]] = []
    llm.finetune(
        train=Prompts(SHAPES[args.shape].vocab, batch, seed=0).records(),
        objective=Classification(template="{sentence}", options=list(OPTION_TEXTS)),
        method=LoZO(rank=args.rank, interval=args.interval, eps=1e-3, queries=queries),
        learning_rate=1e-7,
        batch_size=batch,
        steps=args.warmup + args.steps,
        update_space=args.space,
        callbacks=[lambda run, record: taken.append(clock.take())],
        progress=False,
    )
    return taken[args.warmup :]


def measure(args: argparse.Namespace, model: str) -> dict[str, Any]:
    from vllm_zo import LLM

    # Room for every configuration in one pass: with a lower limit a group of 256 sequences would run in waves.
    directions = DIRECTIONS[args.device]
    configurations = [(b, 1) for b in BATCHES] + [(16, k) for k in directions if k > 1]
    options = {"max_num_seqs": 512, "max_num_batched_tokens": 16384}
    if args.device == "cuda":
        options |= gpu.engine_options(model, group_tokens(args, configurations), max_num_seqs=512)
    llm = LLM(model, dtype=args.dtype, zo_training={"slots": 2 * max(directions)}, **options)
    clock = attach_clock(llm)
    steps: dict[tuple[int, int], list[dict[str, Any]]] = {c: [] for c in configurations}
    for number in range(args.rounds):
        for batch, queries in configurations:
            steps[batch, queries] += take_steps(llm, clock, args, batch, queries)
            middle = median(s["step"] for s in steps[batch, queries])
            print(f"round {number + 1}: batch {batch}, K {queries}: {middle:.1f} ms", file=sys.stderr)
    ms = {c: median(s["step"] for s in taken) for c, taken in steps.items()}
    apart = steps[16, 1]
    if args.device == "cuda":
        import torch

        clock.finish = torch.cuda.synchronize
        apart = [step for _ in range(args.rounds) for step in take_steps(llm, clock, args, 16, 1)]
    return {
        "phases": {p: median(s[p] for s in apart) for p in PHASES} | {"step": ms[16, 1]},
        "directions": {k: ms[16, k] for k in directions},
        "batch": {b: ms[b, 1] for b in BATCHES},
    }


def group_tokens(args: argparse.Namespace, configurations: list[tuple[int, int]]) -> set[int]:
    """The sizes of all groups to come. Every job starts with the same batches."""
    vocab = SHAPES[args.shape].vocab
    return {
        queries * Prompts(vocab, batch, seed=0).tokens(step)
        for batch, queries in configurations
        for step in range(args.warmup + args.steps)
    }


def show(result: dict[str, Any]) -> None:
    phases, step = result["phases"], result["phases"]["step"]
    print(f"\n| phase | ms | share |\n|---|---|---|\n| step | {step:.1f} | |")
    for phase in PHASES:
        print(f"| {phase} | {phases[phase]:.2f} | {phases[phase] / step:.1%} |")
    one = result["directions"][1]
    print("\n| directions in a group | ms per step | ms per direction | of K = 1 |\n|---|---|---|---|")
    for k, ms in result["directions"].items():
        print(f"| {k} | {ms:.1f} | {ms / k:.1f} | {ms / k / one:.2f} |")
    small = result["batch"][16]
    print("\n| batch | ms per step | ms per example | of batch 16 |\n|---|---|---|---|")
    for b, ms in result["batch"].items():
        print(f"| {b} | {ms:.1f} | {ms / b:.2f} | {(ms / b) / (small / 16):.2f} |")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--space", choices=("bank", "fold"), default="bank")
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--interval", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=2, help="first steps of a job that do not count")
    parser.add_argument("--steps", type=int, default=6, help="counted steps of a job")
    parser.add_argument("--rounds", type=int, default=2)
    add_device(parser)
    parser.add_argument("--cores", default=None, help='cores to use, e.g. "0,1" (default: the first two; GPU: all)')
    parser.add_argument("--model-dir", help="use this checkpoint of the shape instead of making one")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    choose_device(parser, args)
    cores = facts.chosen_cores(args.cores, args.device)
    os.sched_setaffinity(0, cores)
    os.environ.update(environment("ours", cores))
    machine = facts.machine(cores) | {"gpu": args.card}
    scratch = Path(tempfile.mkdtemp(prefix="step_anatomy_"))
    try:
        result = measure(args, args.model_dir or str(make_checkpoint(args, scratch)))
    finally:
        shutil.rmtree(scratch)
    print(f"{title(args.shape)} {args.dtype}, {args.space}, on {args.card['name'] if args.card else 'the CPU'}")
    show(result)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
