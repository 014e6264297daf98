"""Peak memory of an engine with a running job, against the same engine with LoRA enabled and no job.

    python benchmarks/memory.py --json memory.json                       # OPT-125M shape, bf16, 3 rounds
    python benchmarks/memory.py --rounds 1 --variants serving,bank --slot-rank 64

Variants, each a process of its own with the engine core inside it, so that its resident set (RSS) is all there is:

    idle      vLLM's own LLM with enable_lora and the same max_loras and max_lora_rank; serves nothing
    serving   the same; answers the prompts of the bank job, batch after batch, both signs' worth at a time
    bank      zo_training, and a LoZO job long enough to use every basis
    fold      zo_training, and a job that folds a few times

All have a KV cache of the same size. Linux gives it pages as they are first written, and allocators and kernel caches
grow with every new batch size, so that only an engine that has done as much work holds as much: `serving` is the fair
partner of a job, `idle` a lower bound. Orders alternate by the round.

On a GPU the peaks are of what torch has allocated there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts, gpu
from benchmarks.children import variables_of
from benchmarks.core_step import make_checkpoint
from benchmarks.options import add_device, add_model, choose_device
from benchmarks.shapes import OPTION_TEXTS, SHAPES, Prompts

VARIANTS = ("idle", "serving", "bank", "fold")
SERVING_LORAS = 1
"""`max_loras` for users' own adapters, in every variant; the two ZO slots come on top of it."""
ZO_SLOTS = 2
PUBLISHED_INTERVAL = 50
"""Steps over which the table spreads the cost of a refresh, whatever the interval of the run: the papers' nu."""
MIB = 1 << 20
KV_MIB = {"cpu": 256, "cuda": 4096}
TARGET = 1.10


def peak_rss() -> int:
    """Bytes: most memory this process had resident since it started, or since `reset_peak`."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def reset_peak() -> None:
    """Start the peak again at what is resident now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    if device == "cpu":
        return peak_rss()
    import torch

    return torch.cuda.max_memory_allocated()


def start_again(device: str) -> None:
    """The next `peak` counts from here."""
    if device == "cpu":
        return reset_peak()
    import torch

    torch.cuda.reset_peak_memory_stats()


class RefreshClock:
    """A callback of `finetune`: wall time of the steps that refresh V (and fold), apart from the others."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.plain_ms: list[float] = []
        self.refresh_ms: list[float] = []
        self.last: float | None = None

    def __call__(self, run: Any, record: dict[str, Any]) -> None:
        now = time.perf_counter()
        if self.last is not None and "eval_loss" not in record:
            refreshes = (record["step"] - 1) % self.interval == 0  # records count completed steps
            (self.refresh_ms if refreshes else self.plain_ms).append(1e3 * (now - self.last))
        self.last = now

    def figures(self) -> dict[str, float]:
        plain = median(self.plain_ms)
        extra = sum(self.refresh_ms) / len(self.refresh_ms) - plain
        return {"step_ms": plain, "refresh_ms": extra, "refresh_ms_amortised": extra / PUBLISHED_INTERVAL}


def measure(variant: str, args: argparse.Namespace) -> dict[str, float]:
    """Start an engine, let it do the variant's work; peaks in bytes, step times of a job."""
    prompts = Prompts(SHAPES[args.shape].vocab, args.batch, args.seed)
    common: dict[str, Any] = {}
    if args.device == "cuda":
        groups = map(prompts.tokens, range(max(args.bank_steps, args.fold_steps)))
        common = gpu.engine_options(args.model_dir, groups, 2 * args.batch)
    common |= {"dtype": args.dtype, "kv_cache_memory_bytes": args.kv_mib * MIB, "max_loras": SERVING_LORAS}
    if variant in ("bank", "fold"):
        from vllm_zo import LLM

        llm = LLM(args.model_dir, zo_training={"slots": ZO_SLOTS, "slot_rank": args.slot_rank}, **common)
        work = job
    else:
        from vllm import LLM as Plain

        loras = SERVING_LORAS + ZO_SLOTS
        common |= {"enable_lora": True, "max_loras": loras, "max_cpu_loras": loras, "max_lora_rank": args.slot_rank}
        llm = Plain(args.model_dir, **common)
        work = serve if variant == "serving" else rest
    start = peak(args.device)
    start_again(args.device)
    ready = peak(args.device)
    extra = work(llm, prompts, variant, args)
    return {"start": start, "ready": ready, "work": peak(args.device), **extra}


def rest(llm: Any, prompts: Prompts, variant: str, args: argparse.Namespace) -> dict[str, float]:
    return {}


def serve(llm: Any, prompts: Prompts, variant: str, args: argparse.Namespace) -> dict[str, float]:
    """One greedy token for each prompt of each step, twice: the batches that the members of the job make."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0)
    for step in range(args.bank_steps):
        tokens = [{"prompt_token_ids": ids} for ids in prompts.batch(step)[0]]
        llm.generate(tokens + tokens, params, use_tqdm=False)
    return {}


def job(llm: Any, prompts: Prompts, variant: str, args: argparse.Namespace) -> dict[str, float]:
    from vllm_zo import Classification, LoZO

    clock = RefreshClock(args.interval)
    llm.finetune(
        prompts.records(),
        objective=Classification(template="{sentence}", options=list(OPTION_TEXTS)),
        method=LoZO(rank=args.rank, interval=args.interval, eps=args.eps),
        learning_rate=args.lr,
        batch_size=args.batch,
        steps=args.bank_steps if variant == "bank" else args.fold_steps,
        seed=args.seed,
        update_space=variant,
        callbacks=[clock],
        progress=False,
    )
    return clock.figures()


def _child(variant: str, conn: Connection, args: argparse.Namespace) -> None:
    try:
        conn.send(measure(variant, args))
    except Exception:
        conn.send(traceback.format_exc())


def run(variant: str, args: argparse.Namespace) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    conn, theirs = context.Pipe()
    with variables_of("ours", args.cores):
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule --kv-mib
        process = context.Process(target=_child, args=(variant, theirs, args))
        process.start()
    theirs.close()
    try:
        answer = conn.recv()
    except EOFError:
        raise SystemExit(f"{variant}: the child process died; see its output above") from None
    process.join()
    if isinstance(answer, str):
        raise SystemExit(f"{variant} failed:\n{answer}")
    print(f"{variant}: " + ", ".join(f"{key} {value:,.1f}" for key, value in answer.items()), file=sys.stderr)
    figures: dict[str, float] = answer
    return figures


def summarise(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds; ratios of peaks, taken within a round first.

    peak    over the whole life of the process, its start included
    work    from when the engine was ready
    """
    summary: dict[str, dict[str, float]] = {}
    for variant in rounds[0]:
        runs = [one[variant] | {"peak": max(one[variant]["start"], one[variant]["work"])} for one in rounds]
        summary[variant] = {key: median(r[key] for r in runs) for key in runs[0]}
        for partner in {"idle", "serving"} & rounds[0].keys():
            others = [max(one[partner]["start"], one[partner]["work"]) for one in rounds]
            summary[variant][f"peak_to_{partner}"] = median(
                r["peak"] / other for r, other in zip(runs, others, strict=True)
            )
    return summary


def markdown(summary: dict[str, dict[str, float]]) -> str:
    """The table: MiB, ratios, and what a refresh costs."""
    lines = [
        "| engine | peak at start | ready | peak at work | peak | to `serving` | to `idle` | ms/step | ms a refresh | "
        "over 50 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, s in summary.items():
        sizes = " | ".join(f"{s[key] / MIB:.0f}" for key in ("start", "ready", "work", "peak"))
        ratios = " | ".join(f"{s[k]:.3f}" if k in s else "" for k in ("peak_to_serving", "peak_to_idle"))
        times = " | ".join(f"{s[k]:.1f}" if k in s else "" for k in ("step_ms", "refresh_ms", "refresh_ms_amortised"))
        lines.append(f"| {variant} | {sizes} | {ratios} | {times} |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--kv-mib", type=int, help="KV cache, MiB (default: 256; on a GPU 4096)")
    parser.add_argument("--slot-rank", type=int, default=16, help="max_lora_rank of all variants")
    parser.add_argument("--batch", type=int, default=16, help="examples a step")
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--interval", type=int, default=20, help="steps between refreshes; short, to see many soon")
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--lr", type=float, default=1e-7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bank-steps", type=int, default=160, help="7 bases of 20 steps, and back to the first")
    parser.add_argument("--fold-steps", type=int, default=70, help="3 folds, and one at the end")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of: {', '.join(VARIANTS)}")
    add_device(parser)
    parser.add_argument("--cores", help='cores to use, e.g. "0,1" (default: the first two; GPU: all)')
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args(argv)
    args.variants = args.variants.split(",")
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"--variants {unknown.pop()}: must be of {', '.join(VARIANTS)}")
    if min(args.bank_steps, args.fold_steps) <= args.interval:
        parser.error(f"--bank-steps and --fold-steps: must exceed --interval {args.interval}, to hold a refresh")
    choose_device(parser, args)
    args.kv_mib = args.kv_mib or KV_MIB[args.device]
    args.cores = facts.chosen_cores(args.cores, args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    os.sched_setaffinity(0, args.cores)
    machine = facts.machine(args.cores) | {"gpu": args.card}
    scratch = Path(tempfile.mkdtemp(prefix="memory_"))
    try:
        args.model_dir = str(make_checkpoint(args, scratch))
        rounds = []
        for number in range(args.rounds):
            order = args.variants if number % 2 == 0 else args.variants[::-1]
            measured = {variant: run(variant, args) for variant in order}
            rounds.append({variant: measured[variant] for variant in args.variants})
    finally:
        shutil.rmtree(scratch)
    summary = summarise(rounds)
    if args.card is not None:
        print(f"OPT {args.shape} {args.dtype} on {args.card['name']}, KV cache {args.kv_mib} MiB\n")
    print(markdown(summary))
    if "bank" in summary and "serving" in summary:
        ratio = summary["bank"]["peak_to_serving"]
        print(f"\nbank / serving: {ratio:.3f} (target: at most {TARGET:.2f})")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "model_dir")}
        document = {"machine": machine, "settings": settings, "rounds": rounds, "summary": summary}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
