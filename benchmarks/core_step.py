"""Milliseconds per LoZO step: vllm_zo against other ways to take the same step, in turns in one call.

    python benchmarks/core_step.py --shape 125m --dtype bfloat16 --space bank --json out.json
    python benchmarks/core_step.py --no-ours --dtype float32 --against packed,packed-prepacked,strong --rounds 3

benchmarks/README.md describes the contenders and says how the figures come about.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts, gpu, report
from benchmarks.children import Failed, Ready, Timing, Window, child_main, variables_of
from benchmarks.options import SLOW, parse
from benchmarks.shapes import SHAPES

SETTLE_S = 0.5
"""Pause before a window. After its last parallel region an OpenMP runtime spins for a while (Intel's for 0.2 s). The
pause is longer, so that one contender does not slow the next."""


class Contender:
    """A child process and what it has measured."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        self.cores = args.cores
        self.details: dict[str, Any] = {}
        self.windows: list[dict[str, Any]] = []

    def start(self) -> None:
        print(f"starting {self.name}", file=sys.stderr)
        name, args = self.name, self.args
        context = multiprocessing.get_context("spawn")
        self.conn, theirs = context.Pipe()
        with variables_of(name, args.cores):
            self.process: SpawnProcess = context.Process(target=child_main, args=(name, theirs, args))
            self.process.start()
        # With our copy of the child's end open, `recv` would wait for ever for a child that has died.
        theirs.close()
        self.details = _answer(self.conn, self.name, Ready).details
        self.run(Window(0, args.warmup))

    def run(self, window: Window) -> dict[str, Any]:
        """Let the child take a window of steps while the other children wait."""
        time.sleep(SETTLE_S)
        busy, start = facts.busy_seconds(self.cores), time.perf_counter()
        self.conn.send(window)
        timing = _answer(self.conn, self.name, Timing)
        wall = time.perf_counter() - start
        foreign = facts.busy_seconds(self.cores) - busy - timing.cpu_seconds
        return {
            "start": window.start,
            "ms": [1e3 * s for s in timing.seconds],
            "losses": timing.losses,
            "cpu_ms_per_step": 1e3 * timing.cpu_seconds / window.count,  # it includes spinning threads
            "gpu_bytes": timing.gpu_bytes,
            "foreign_load": max(0.0, foreign / (wall * len(self.cores))),
        }

    def stop(self) -> None:
        with contextlib.suppress(OSError):  # the child may have died
            self.conn.send(None)
        self.process.join(timeout=60)
        if self.process.is_alive():  # the next contender may need its memory
            self.process.kill()
            self.process.join()


def _answer(conn: Connection, name: str, kind: type) -> Any:
    try:
        answer = conn.recv()
    except EOFError:
        raise SystemExit(f"{name}: the child process died; see its output above") from None
    if isinstance(answer, Failed):
        raise SystemExit(f"{name} failed:\n{answer.message}")
    assert isinstance(answer, kind), answer
    return answer


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run all contenders round by round. Returns name -> details and windows.

    Every window starts with a refresh step (a multiple of the interval). The order of the contenders turns by one place
    with each round, so that each contender takes every place in it. All live from the first round to the last. If they
    do not fit on a GPU together (`args.apart`), each starts for its window and ends after it.
    """
    contenders = [Contender(name, args) for name in args.contenders]
    started: list[Contender] = []
    try:
        for number in range(args.rounds):
            turn = number % len(contenders)
            if number == 0 and not args.apart:
                for contender in contenders:
                    started.append(contender)
                    contender.start()
            for contender in contenders[turn:] + contenders[:turn]:
                if args.apart:
                    started.append(contender)
                    contender.start()
                count = args.slow_steps if contender.name in SLOW else args.window
                window = contender.run(Window(args.first_step + number * args.stride, count))
                contender.windows.append(window)
                mean = sum(window["ms"]) / count
                print(f"round {number + 1}/{args.rounds} {contender.name}: {mean:.1f} ms/step", file=sys.stderr)
                if args.apart:
                    started.pop().stop()
        return {c.name: {"details": c.details, "windows": c.windows} for c in contenders}
    finally:
        for contender in started:
            contender.stop()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv, __doc__)
    # Before any child starts: it inherits the cores.
    os.sched_setaffinity(0, args.cores)
    before = facts.machine(args.cores)
    least = None
    if args.card is not None:
        before["gpu"] = args.card | {"rates": gpu.rates(args.dtype)}
        least = gpu.floor(SHAPES[args.shape], args.dtype, args.batch, before["gpu"]["rates"])
    scratch = Path(tempfile.mkdtemp(prefix="core_step_"))
    try:
        if args.model_dir is None:
            args.model_dir = str(make_checkpoint(args, scratch))
        measured = measure(args)
    finally:
        shutil.rmtree(scratch)
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "model_dir")}
    result = report.summarise(measured, args.interval, reference=args.contenders[-1] if args.no_ours else "ours")
    document = {"machine": before, "settings": settings, "contenders": result, "floor": least}
    report.show(document)
    if args.json:
        args.json.write_text(json.dumps(document, indent=1, default=str) + "\n")


def make_checkpoint(args: argparse.Namespace, directory: Path) -> Path:
    """Write a checkpoint, in a process of its own: this one must stay without torch and its thread pool."""
    weights = getattr(args, "device", "cpu") == "cpu"  # with a GPU, a contender makes them there and no disk holds them
    process = multiprocessing.get_context("spawn").Process(
        target=_write_checkpoint, args=(args.shape, args.dtype, directory / "model", weights)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the checkpoint could not be written; see above")
    return directory / "model"


def _write_checkpoint(shape: str, dtype: str, directory: Path, weights: bool) -> None:
    from benchmarks.shapes import write_checkpoint

    write_checkpoint(SHAPES[shape], dtype, directory, weights=weights)


if __name__ == "__main__":
    main()
