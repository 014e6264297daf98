"""One server that serves and trains, against a server with a second process beside it that trains, on the same cores.

    python benchmarks/one_process.py --seconds 30 --rounds 2
    python benchmarks/one_process.py --model DIR --rates 1 --json one.json           # a real model

Contenders, which take turns; each has the same requests, streamed completions that arrive at random (Poisson):

    none   the server alone
    one    the server trains, too: LoZO, `--zo-slowdown 1.1`
    two    the server serves, and a process with an engine of its own takes the same LoZO steps as fast as it can
    lora   the server serves, and a process trains LoRA with AdamW by back-propagation (peft) as fast as it can

One server runs throughout; its job is paused, and the processes are stopped (SIGSTOP), while others have their turn. A
step of LoRA is another one than a step of LoZO: compare its latencies and memory, not its steps. Memory is the sum of
the proportional set sizes of all processes of a contender after its last window.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts, serving
from benchmarks.reviews import OPTIONS, ROWS, TEMPLATE, Reviews

CONTENDERS = ("none", "one", "two", "lora")
BATCH, RATE = 16, 1e-6
START_S = 300.0


def train_lozo(model: str, dtype: str, steps: Synchronized[int]) -> None:
    """The second process of `two`: the job of `one` in an engine of its own."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm_zo import LLM, Classification

    def count(run: Any, record: dict[str, Any]) -> None:
        steps.value = record["step"]

    llm = LLM(model, dtype=dtype, max_model_len=256, zo_training=True)
    objective = Classification(template=TEMPLATE, options=list(OPTIONS))
    job = {"learning_rate": RATE, "bases": 1, "divergence_factor": None, "batch_size": BATCH, "steps": 1_000_000}
    llm.finetune(ROWS, objective=objective, callbacks=[count], progress=False, **job)


def train_lora(model: str, dtype: str, steps: Synchronized[int]) -> None:
    """The second process of `lora`."""
    import torch

    from benchmarks.baselines.lora_backprop import LoraTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    prompts = Reviews(model, BATCH)
    trainer = LoraTrainer(model, getattr(torch, dtype), prompts.option_ids, checkpointing=False, device="cpu")
    while True:
        trainer.step(*prompts.batch(steps.value))
        steps.value += 1


class Neighbour:
    """A process that trains beside the server. It is stopped except in its own turns."""

    def __init__(self, target: Any, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.steps: Any = context.Value("q", 0)
        self.process = context.Process(target=target, args=(args.model, args.dtype, self.steps), daemon=True)
        self.process.start()
        deadline = time.monotonic() + START_S
        while self.steps.value < 5:  # past its warm-up
            if not self.process.is_alive() or time.monotonic() > deadline:
                raise SystemExit("the second process does not train; see its output above")
            time.sleep(0.2)
        self.run(signal.SIGSTOP)

    def run(self, what: signal.Signals) -> None:
        os.kill(self.process.pid or 0, what)

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def memory_of(pid: int) -> int:
    """Bytes of a process and its children: proportional set sizes, so that what they share counts once."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(int(process.memory_full_info().pss) for process in processes)


async def measure(server: serving.Server, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{rate:g}": {name: {"samples": [], "steps_per_s": [], "memory": 0} for name in args.contenders}
        for rate in args.rates
    }
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        await serving.window(server, args, max(args.rates), seed=99)  # warms it up
        # Before the job: its buffers stay when it pauses.
        serves_only = memory_of(server.process.pid)
        job = await serving.create_job(client, args)
        await serving.status_is(client, job, "running", step=5)
        await turn(client, job, "pause", "paused")
        makers = {"two": train_lozo, "lora": train_lora}
        neighbours = {name: Neighbour(makers[name], args) for name in args.contenders if name in makers}
        try:
            for number in range(args.rounds):
                for rate in args.rates:
                    order = args.contenders if number % 2 == 0 else args.contenders[::-1]
                    for name in order:
                        one = found[f"{rate:g}"][name]
                        await one_window(server, client, job, neighbours.get(name), name, rate, number, args, one)
                        beside = memory_of(neighbours[name].process.pid or 0) if name in neighbours else 0
                        one["memory"] = memory_of(server.process.pid) if name == "one" else serves_only + beside
        finally:
            for neighbour in neighbours.values():
                neighbour.close()
    return found


async def turn(client: httpx.AsyncClient, job: str, verb: str, status: str) -> None:
    await serving.post(client, f"/v1/fine_tuning/jobs/{job}/{verb}")
    await serving.status_is(client, job, status)


async def one_window(
    server: serving.Server, client: httpx.AsyncClient, job: str, neighbour: Neighbour | None, name: str, rate: float,
    number: int, args: argparse.Namespace, into: dict[str, Any],
) -> None:  # fmt: skip
    if name == "one":
        await turn(client, job, "resume", "running")
    if neighbour is not None:
        neighbour.run(signal.SIGCONT)

    async def taken() -> int:
        return int(neighbour.steps.value) if neighbour is not None else await serving.step_of(client, job)

    begin, start = await taken(), time.perf_counter()
    samples, _ = await serving.window(server, args, rate, seed=number + 1)
    into["samples"] += samples
    steps = (await taken() - begin) / (time.perf_counter() - start)
    into["steps_per_s"].append(steps)
    if name == "one":
        await turn(client, job, "pause", "paused")
    if neighbour is not None:
        neighbour.run(signal.SIGSTOP)
    ttft = serving.percentiles([sample[0] for sample in into["samples"]])
    serving.say(f"{rate:g}/s {name}: TTFT {ttft}, {steps:.2f} steps/s")


def table(found: dict[str, Any]) -> str:
    lines = ["| requests/s | contender | steps/s | TTFT p50, p99, ms | TPOT p50, p99, ms | memory, MiB |"]
    lines.append("|---|---|---|---|---|---|")
    for rate, contenders in found.items():
        for name, one in contenders.items():
            times = [serving.percentiles([s[index] for s in one["samples"]]) for index in (0, 1)]
            cells = " | ".join(f"{t['p50']:.1f}, {t['p99']:.1f}" for t in times)
            steps = f"{statistics.median(one['steps_per_s']):.2f}" if name != "none" else ""
            lines.append(f"| {rate} | `{name}` | {steps} | {cells} | {one['memory'] / 2**20:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(serving.MODEL), help="a directory (default: the demo model)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help=f"of: {', '.join(CONTENDERS)}")
    parser.add_argument("--rates", default="2,8", help="requests a second")
    parser.add_argument("--slowdown", type=float, default=1.1, help="--zo-slowdown of the server")
    serving.add_requests(parser)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a window")
    parser.add_argument("--rounds", type=int, default=2, help="windows of each contender at each rate")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    args = parser.parse_args()
    args.contenders = args.contenders.split(",")
    if unknown := set(args.contenders) - set(CONTENDERS):
        parser.error(f"--contenders {unknown.pop()}: must be of {', '.join(CONTENDERS)}")
    args.rates = [float(rate) for rate in args.rates.split(",")]
    args.device, args.model_dir, args.rows, args.objective = "cpu", args.model, ROWS.read_text(), serving.OBJECTIVE
    machine = facts.machine(sorted(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as state, serving.Server(args.slowdown, Path(state) / "state", args) as server:
        found = asyncio.run(measure(server, args))
    if args.json:
        settings = {**vars(args), "json": None, "rows": None, "model": Path(args.model).name, "model_dir": None}
        args.json.write_text(json.dumps({"machine": machine, "settings": settings, "results": found}, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
