"""The peak memory of an engine with a running job, against the same engine without one, and against back-propagation.

    python benchmarks/memory.py --json memory.json                       # OPT-125M shape, bf16, 3 rounds
    python benchmarks/memory.py --rounds 1 --variants serving,bank --slot-rank 64
    python benchmarks/memory.py --model DIR --variants serving,bank,lora,lora-checkpointing      # a real model
    python benchmarks/memory.py --computed                               # 7B and 13B, by arithmetic

Each variant runs in a process of its own with the engine core inside it, so that its resident set (RSS) holds
everything:

    idle      vLLM's own LLM with enable_lora and the same max_loras and max_lora_rank; it serves nothing
    serving   the same; it answers the prompts of the bank job, step by step, each prompt twice (for both signs)
    bank      zo_training, and a LoZO job long enough to use every basis
    fold      zo_training, and a job that folds a few times
    lora      no engine: LoRA with AdamW by back-propagation (peft) on the same batches; lora-checkpointing likewise

Who trains by back-propagation beside serving needs the last and an engine: the column "beside serving" adds the peak of
`serving` to it.

All have a KV cache of the same size. Linux gives it a page when the engine first writes there, and allocators and
kernel caches grow with every new batch size. So only an engine that has done as much work holds as much: `serving` is
the fair partner of a job, and `idle` a lower bound. The order of the variants alternates from round to round.

On a GPU the peaks are those of the memory that torch has allocated there.
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
from benchmarks.reviews import Reviews
from benchmarks.shapes import SHAPES, Prompts, Shape, mean_longest, title

VARIANTS = ("idle", "serving", "bank", "fold")
APART = ("lora", "lora-checkpointing")
"""Variants that serve nothing: training beside serving takes an engine as well."""
SERVING_LORAS = 1
"""`max_loras` for users' own adapters, in every variant. The two ZO slots come in addition."""
ZO_SLOTS = 2
PUBLISHED_INTERVAL = 50
"""The table spreads the cost of a refresh over this many steps, the papers' nu, whatever the interval of the run is."""
MIB = 1 << 20
KV_MIB = {"cpu": 256, "cuda": 4096}
LONGEST = 512
"""Tokens of a sequence of a real model; the longest review has some hundred."""
TARGET = 1.10


def peak_rss() -> int:
    """The most bytes that this process has had resident since it started, or since `reset_peak`."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def reset_peak() -> None:
    """Start the peak again at the bytes that are resident now (proc(5), clear_refs)."""
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
    """A callback of `finetune` that times the steps that refresh V (and fold) apart from the others."""

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
    """Start an engine and let it do the variant's work. Returns peaks in bytes, and the step times of a job."""
    prompts = prompts_of(args)
    if variant in APART:
        return backpropagate(variant, prompts, args)
    common: dict[str, Any] = {}
    if args.device == "cuda":
        groups = map(prompts.tokens, range(max(args.bank_steps, args.fold_steps)))
        common = gpu.engine_options(args.model_dir, groups, 2 * args.batch)
    common |= {"dtype": args.dtype, "kv_cache_memory_bytes": args.kv_mib * MIB, "max_loras": SERVING_LORAS}
    if args.model:  # vLLM wants a KV cache for a sequence as long as the model has positions for
        common["max_model_len"] = LONGEST
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


def prompts_of(args: argparse.Namespace) -> Prompts | Reviews:
    if args.model:
        return Reviews(args.model, args.batch, args.seed)
    return Prompts(SHAPES[args.shape].vocab, args.batch, args.seed)


def backpropagate(variant: str, prompts: Any, args: argparse.Namespace) -> dict[str, float]:
    """Take the steps of the bank job, on its batches."""
    import torch

    from benchmarks.baselines.lora_backprop import LoraTrainer

    torch.set_num_threads(len(args.cores))
    checkpointing = variant == "lora-checkpointing"
    dtype, options = getattr(torch, args.dtype), prompts.option_ids
    trainer = LoraTrainer(args.model_dir, dtype, options, checkpointing=checkpointing, device=args.device)
    start = peak(args.device)
    start_again(args.device)
    ready, seconds = peak(args.device), []
    for step in range(args.bank_steps):
        began = time.perf_counter()
        trainer.step(*prompts.batch(step))
        seconds.append(time.perf_counter() - began)
    return {"start": start, "ready": ready, "work": peak(args.device), "step_ms": 1e3 * median(seconds)}


def rest(llm: Any, prompts: Prompts, variant: str, args: argparse.Namespace) -> dict[str, float]:
    return {}


def serve(llm: Any, prompts: Prompts, variant: str, args: argparse.Namespace) -> dict[str, float]:
    """Generate one greedy token for each prompt of each step, twice. The members of a job make the same batches."""
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
        objective=Classification(template=prompts.template, options=list(prompts.options)),
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
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override --kv-mib
        process = context.Process(target=_child, args=(variant, theirs, args))
        process.start()
    # With our copy of the child's end open, `recv` would wait for ever for a child that has died.
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
    """The medians over the rounds. A ratio of peaks is taken within each round first.

    peak    over the whole life of the process, with its start
    work    since the engine was ready
    """
    summary: dict[str, dict[str, float]] = {}
    for variant in rounds[0]:
        runs = [one[variant] | {"peak": max(one[variant]["start"], one[variant]["work"])} for one in rounds]
        summary[variant] = {key: median(r[key] for r in runs) for key in runs[0]}
        if variant in APART and "serving" in rounds[0]:
            servers = [max(one["serving"]["start"], one["serving"]["work"]) for one in rounds]
            summary[variant]["beside"] = median(r["peak"] + s for r, s in zip(runs, servers, strict=True))
        for partner in {"idle", "serving"} & rounds[0].keys():
            others = [max(one[partner]["start"], one[partner]["work"]) for one in rounds]
            summary[variant][f"peak_to_{partner}"] = median(
                r["peak"] / other for r, other in zip(runs, others, strict=True)
            )
    return summary


def markdown(summary: dict[str, dict[str, float]]) -> str:
    """The table with MiB, ratios, and the cost of a refresh."""
    lines = [
        "| engine | peak at start | ready | peak at work | peak | to `serving` | to `idle` | beside serving | "
        "ms/step | ms a refresh | over 50 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, s in summary.items():
        sizes = " | ".join(f"{s[key] / MIB:.0f}" for key in ("start", "ready", "work", "peak"))
        ratios = " | ".join(f"{s[k]:.3f}" if k in s else "" for k in ("peak_to_serving", "peak_to_idle"))
        times = " | ".join(f"{s[k]:.1f}" if k in s else "" for k in ("step_ms", "refresh_ms", "refresh_ms_amortised"))
        beside = s.get("beside", s["peak"]) / MIB
        lines.append(f"| {variant} | {sizes} | {ratios} | {beside:.0f} | {times} |")
    return "\n".join(lines)


def computed(args: argparse.Namespace) -> str:
    """The table of 7B and 13B, in GiB, by arithmetic: 16-bit weights, rank 2, 7 bases in slots of rank 16."""
    lines = ["| | engine that serves | the same, training | LoRA beside it | LoRA with checkpointing beside it |"]
    lines.append("|---|---|---|---|---|")
    for name in ("6.7b", "13b"):
        weights, job_state, full, checkpointed = parts_of(SHAPES[name], args)
        serves = weights + args.kv_mib * MIB
        cells = (serves, serves + job_state, serves + weights + full, serves + weights + checkpointed)
        lines.append(f"| OPT {name} | " + " | ".join(f"{cell / 2**30:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


def parts_of(shape: Shape, args: argparse.Namespace) -> tuple[float, float, float, float]:
    """Bytes of the weights; of a job; of a LoRA trainer besides its weights, without and with checkpointing.

    Activations: 34 s b h + 5 a s^2 b bytes a layer at 16 bits, 2 s b h with checkpointing and those of one layer
    (Korthikanti et al. 2022, arXiv:2205.05198). Logits of the last token only, as `lora` computes them.

    Raises:
        ValueError: a Llama. The paper counts the activations of layers like OPT's only.
    """
    from vllm_zo import LoZO
    from vllm_zo.job_memory import state_bytes
    from vllm_zo.methods.plan import ModuleShape

    if shape.is_llama:
        raise ValueError(f"shape={shape}: the activations of a Llama are not written here; use an OPT")
    h, layers = shape.hidden, shape.layers
    sizes = list(shape.linears.values())
    weights = 2 * gpu.parameters(shape)
    modules = [ModuleShape(f"{layer}.{i}", a, b) for layer in range(layers) for i, (a, b) in enumerate(sizes)]
    slots = 2 * ZO_SLOTS * args.slot_rank * layers * sum(a + b for a, b in sizes)
    bases = args.slot_rank // args.rank - 1
    a_job = slots + state_bytes(LoZO(rank=args.rank, interval=args.interval), modules, bases)
    lora = 12 * layers * 2 * 8 * 2 * h  # q and v, rank 8: 16-bit weight and gradient, float32 moments
    longest = args.longest or mean_longest(args.batch)
    tokens = longest * args.batch
    layer = 34 * tokens * h + 5 * shape.heads * longest * tokens
    return weights, a_job, lora + layers * layer, lora + layers * 2 * tokens * h + layer


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--model", help="a directory with a real model, instead of a shape; the prompts are reviews")
    parser.add_argument("--computed", action="store_true", help="print the table of 7B and 13B, and measure nothing")
    parser.add_argument("--longest", type=int, help="with --computed: tokens to which prompts are padded (SST-2's: 35)")
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
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of: {', '.join((*VARIANTS, *APART))}")
    add_device(parser)
    parser.add_argument("--cores", help='cores to use, e.g. "0,1" (default: the first two; GPU: all)')
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args(argv)
    args.variants = args.variants.split(",")
    if unknown := set(args.variants) - {*VARIANTS, *APART}:
        parser.error(f"--variants {unknown.pop()}: must be of {', '.join((*VARIANTS, *APART))}")
    if min(args.bank_steps, args.fold_steps) <= args.interval:
        parser.error(f"--bank-steps and --fold-steps: must exceed --interval {args.interval}, to hold a refresh")
    choose_device(parser, args)
    args.kv_mib = args.kv_mib or KV_MIB[args.device]
    args.cores = facts.chosen_cores(args.cores, args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.computed:
        print(computed(args))
        return
    os.sched_setaffinity(0, args.cores)
    machine = facts.machine(args.cores) | {"gpu": args.card}
    scratch = Path(tempfile.mkdtemp(prefix="memory_"))
    try:
        args.model_dir = args.model or str(make_checkpoint(args, scratch))
        rounds = []
        for number in range(args.rounds):
            order = args.variants if number % 2 == 0 else args.variants[::-1]
            measured = {variant: run(variant, args) for variant in order}
            rounds.append({variant: measured[variant] for variant in args.variants})
    finally:
        shutil.rmtree(scratch)
    summary = summarise(rounds)
    if args.card is not None:
        print(f"{title(args.shape)} {args.dtype} on {args.card['name']}, KV cache {args.kv_mib} MiB\n")
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
