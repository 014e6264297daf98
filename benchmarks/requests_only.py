"""What an engine that can train costs requests while no job runs: against stock vLLM, taking turns.

    python benchmarks/requests_only.py                                    # the 7M shape, float32
    python benchmarks/requests_only.py --shape 125m --dtype bfloat16 --rounds 6

`stock` is vLLM's `LLM(..., enable_lora=True)` without our plugin, with a thread bound to each core; `ours` is
`LLM(..., zo_training=True)` as it is by default. Each has a process of its own, and one works at a time. Both get the
same random prompts, new ones in each round, without prefix caching, as one call of `generate`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts
from benchmarks.children import variables_of
from benchmarks.core_step import make_checkpoint
from benchmarks.shapes import NUM_SPECIAL, SHAPES, Shape

CONTENDERS = {"ours": "ours", "stock": "stock-files"}
"""Contender -> whose threads it has (`children.environment`)."""
RANK = 8
SETTLE_S = 0.5
"""Before a turn, so that no thread of the other one still spins."""


class Workload(NamedTuple):
    requests: int
    prompt: int
    """Tokens of a prompt."""
    answer: int
    """Tokens of an answer."""


WORKLOADS = {
    "prefill, 16 prompts of 128 tokens": Workload(16, 128, 1),
    "16 answers of 64 tokens": Workload(16, 8, 64),
    "1 answer of 64 tokens": Workload(1, 8, 64),
}


def random_adapter(shape: Shape, directory: Path) -> Path:
    """Save a LoRA adapter of random factors for all linear layers."""
    import torch

    from benchmarks.baselines.stock_vllm import write_adapter

    sizes = list(shape.linears.values()) * shape.layers
    a = [torch.randn(inputs, RANK) / 100 for _, inputs in sizes]
    b = [torch.randn(outputs, RANK) / 100 for outputs, _ in sizes]
    write_adapter(directory, shape, a, b)
    return directory


def child(name: str, conn: Connection, args: argparse.Namespace) -> None:
    """Answer each (workload, adapter or not, seed) with the seconds that `generate` takes."""
    options: dict[str, Any] = {"dtype": args.dtype, "enable_prefix_caching": False, "max_loras": 1}
    if name == "ours":
        from vllm_zo import LLM

        llm: Any = LLM(args.model_dir, zo_training=True, **options)
    else:
        from vllm import LLM as Stock

        llm = Stock(args.model_dir, enable_lora=True, max_lora_rank=16, **options)
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    vocab, adapter = SHAPES[args.shape].vocab, LoRARequest("adapter", 1, str(args.adapter))
    conn.send("ready")
    while (asked := conn.recv()) is not None:
        workload, with_adapter, seed = asked
        draw = random.Random(seed)
        prompts = [
            {"prompt_token_ids": draw.choices(range(NUM_SPECIAL, vocab), k=workload.prompt)}
            for _ in range(workload.requests)
        ]
        params = SamplingParams(max_tokens=workload.answer, temperature=0.0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, params, lora_request=adapter if with_adapter else None, use_tqdm=False)
        conn.send(time.perf_counter() - start)


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Label of a workload -> contender -> its seconds, a round each."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, threads in CONTENDERS.items():
        pipes[name], theirs = context.Pipe()
        with variables_of(threads, facts.chosen_cores(None)):
            processes.append(context.Process(target=child, args=(name, theirs, args)))
            processes[-1].start()
        theirs.close()  # so that a child that dies ends `recv`
        pipes[name].recv()
    seconds: dict[str, dict[str, list[float]]] = {}
    for number in range(-1, args.rounds):  # the first round warms up
        order = list(CONTENDERS)[:: 1 if number % 2 else -1]
        for label, workload in WORKLOADS.items():
            for with_adapter in (False, True):
                for name in order:
                    time.sleep(SETTLE_S)
                    pipes[name].send((workload, with_adapter, number))
                    taken = pipes[name].recv()
                    found = seconds.setdefault(f"{label}{', LoRA' if with_adapter else ''}", {})
                    found.setdefault(name, []).extend([taken] if number >= 0 else [])
    for name, process in zip(CONTENDERS, processes, strict=True):
        pipes[name].send(None)
        process.join(60)
    return seconds


def show(seconds: dict[str, dict[str, list[float]]]) -> None:
    print("| | stock, ms (range) | ours, ms (range) | ours / stock (range) |\n|---|---|---|---|")
    for label, found in seconds.items():
        ratios = [ours / stock for ours, stock in zip(found["ours"], found["stock"], strict=True)]
        cells = [
            f"{1e3 * median(found[name]):.0f} ({1e3 * min(found[name]):.0f}-{1e3 * max(found[name]):.0f})"
            for name in ("stock", "ours")
        ]
        print(f"| {label} | {' | '.join(cells)} | {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        args.model_dir = str(make_checkpoint(args, Path(scratch)))
        args.adapter = random_adapter(SHAPES[args.shape], Path(scratch) / "adapter")
        seconds = measure(args)
    show(seconds)
    if args.json:
        cores = sorted(os.sched_getaffinity(0))
        args.json.write_text(json.dumps({"machine": facts.machine(cores), "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
