"""The command line of core_step.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import gpu
from benchmarks.baselines import CONTENDERS, CPU_ONLY, GPU_ONLY, OPT_ONLY
from benchmarks.facts import chosen_cores
from benchmarks.shapes import SHAPES

SLOW = ("dense-mezo", "official-full", "official", "official-addmm", "strong", "stock-files", "stock-in-place")
"""Contenders that take only the first steps of a window, because whole windows of them would take too long."""
DEFAULT_AGAINST = {
    "cpu": "official,strong,packed,packed-prepacked",
    "cuda": "official-full,official,compiled,stock-files,stock-in-place,gemms",
}
"""Of these, those that are written for the run's shape."""


def parse(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    """The options of the command line, and what follows from them: contenders, cores, the steps of the whole run."""
    parser = _parser(description)
    args = parser.parse_args(argv)
    if args.interval < 2:
        parser.error(f"--interval {args.interval}: must be at least 2, to tell refresh steps from plain ones")
    if not 1 <= args.warmup <= args.interval:
        parser.error(f"--warmup {args.warmup}: must be from 1 to the interval, {args.interval}, where timing starts")
    args.window = args.window or args.interval
    if args.window % args.interval:
        parser.error(
            f"--window {args.window}: must be a multiple of --interval {args.interval}, to hold whole refreshes"
        )
    if args.slow_steps < 2:
        parser.error(f"--slow-steps {args.slow_steps}: must be at least 2, a refresh step and a plain one")
    args.slow_steps = min(args.slow_steps, args.window)
    if args.method != "lozo" and args.space != "fold":
        parser.error(f"--method {args.method}: runs in no other space; give --space fold")
    choose_device(parser, args)
    args.cores = chosen_cores(args.cores, args.device)
    left_out = OPT_ONLY if SHAPES[args.shape].is_llama else ()
    if args.against is None:
        names = [name for name in DEFAULT_AGAINST[args.device].split(",") if name not in left_out]
    else:
        names = [name for name in args.against.split(",") if name]
    if unknown := [name for name in names if name not in CONTENDERS]:
        parser.error(f"--against {unknown[0]}: must be one of {', '.join(CONTENDERS)}")
    elsewhere = CPU_ONLY if args.device == "cuda" else GPU_ONLY
    if wrong := [name for name in names if name in elsewhere]:
        parser.error(f"--against {wrong[0]}: not for --device {args.device}")
    if wrong := [name for name in names if name in left_out]:
        parser.error(f"--against {wrong[0]}: written for OPT only, not for --shape {args.shape}")
    if "compiled" in names and args.dtype == "float32":
        parser.error("--dtype float32: `compiled` calls FlashAttention, which takes 16-bit types")
    if args.before is not None and not (args.before / "vllm_zo").is_dir():
        parser.error(f"--before {args.before}: has no folder vllm_zo; give another checkout of this project")
    args.contenders = [*([] if args.no_ours else ["ours"]), *(["before"] if args.before else []), *names]
    args.first_step = args.interval
    # On a GPU one untimed interval lies between windows (ours.py says why).
    args.stride = args.window + (args.interval if args.device == "cuda" else 0)
    args.total_steps = args.first_step + args.rounds * args.stride
    args.apart = False
    if args.card is not None:
        fits = gpu.fit_together(SHAPES[args.shape], args.dtype, len(args.contenders), args.card["memory_bytes"])
        args.apart = not fits
    return args


def choose_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set `device`, and set `card` to the facts of the GPU (None on a CPU)."""
    args.card = None if args.device == "cpu" else gpu.find()
    if args.device == "cuda" and args.card is None:
        parser.error("--device cuda: torch sees no GPU")
    args.device = "cpu" if args.card is None else "cuda"


def add_model(parser: argparse.ArgumentParser, *, shape: str = "125m", dtype: str = "bfloat16") -> None:
    parser.add_argument("--shape", choices=SHAPES, default=shape)
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default=dtype)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--batch", type=int, default=16, help="examples a step")
    parser.add_argument("--method", choices=("lozo", "factorized-mezo", "mezo"), default="lozo", help="what ours runs")
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--interval", type=int, default=50, help="steps between refreshes of V")
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--lr", type=float, default=1e-7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--space", choices=("bank", "fold"), default="bank", help="update space of ours")
    parser.add_argument(
        "--window", type=int, help="timed steps in a row, a multiple of the interval (default: the interval)"
    )
    parser.add_argument("--slow-steps", type=int, default=8, help=f"steps of a window that {SLOW} take, its first ones")
    parser.add_argument("--warmup", type=int, default=3, help="steps before timing starts")
    parser.add_argument("--rounds", type=int, default=5, help="windows of each contender")
    parser.add_argument(
        "--against", help=f"of: {', '.join(CONTENDERS)} (default: {'; '.join(DEFAULT_AGAINST.values())} on a GPU)"
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help="another checkout of this project, whose engine takes part as the contender `before`",
    )
    parser.add_argument(
        "--no-ours", action="store_true", help="time the baselines only; ratios are to the last of them"
    )
    add_device(parser)
    parser.add_argument("--cores", default=None, help='cores to use, e.g. "0,1" (default: the first two; GPU: all)')
    parser.add_argument("--model-dir", help="use this checkpoint of the shape instead of making one")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser
