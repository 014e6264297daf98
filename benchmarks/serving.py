"""What a fine-tuning job costs the requests that are served beside it, and what they leave the job.

    python benchmarks/serving.py                              # the demo model, three token budgets
    python benchmarks/serving.py --budgets 64 --rounds 6 --json serving.json
    python benchmarks/serving.py --shape 13b --dtype float16 --budgets 256,1024,0 --rate 20   # random weights

A real server for each token budget (`vllm-zo serve --zo-token-budget`), a steady stream of streamed completions that
arrive at random (Poisson), and windows with a job and without, taking turns. TTFT is from sending a request to its
first token, TPOT the mean time between its further tokens; both over HTTP, on the cores that serve. Ratios are of the
pooled percentiles with the job to those without, from the same server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts, gpu
from benchmarks.core_step import make_checkpoint
from benchmarks.options import add_device, choose_device
from benchmarks.shapes import OPTION_TEXTS, SHAPES, Prompts

ROOT = Path(__file__).parents[1]
MODEL, REVIEWS = ROOT / "examples" / "demo" / "model", ROOT / "examples" / "demo" / "reviews" / "train.jsonl"
OBJECTIVE = {"name": "classification", "template": "{sentence} It was", "options": [" terrible", " great"]}
HYPERPARAMETERS = {"steps": 1_000_000, "learning_rate": 1e-6, "bases": 1, "divergence_factor": None, "batch_size": 16}
START_S = {"cpu": 180, "cuda": 420}
"""On a GPU a first start compiles the model and captures its graphs."""
LARGEST_GRAPH = 1024


class Server:
    """`vllm-zo serve` on a port of its own."""

    def __init__(self, budget: int, state_dir: Path, args: argparse.Namespace) -> None:
        self.start_s = START_S[args.device]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-c", "from vllm_zo.entrypoints.cli import main; main()", "serve", args.model_dir]
        command += ["--served-model-name", "demo", "--dtype", args.dtype, "--max-model-len", "256", "--port", str(port)]
        command += ["--zo-state-dir", str(state_dir), "--zo-token-budget", str(budget), "--disable-uvicorn-access-log"]
        if args.device == "cuda":
            command += gpu_flags(args.model_dir)
        variables = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # a server's engine is a process of its own
        self.process = subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL)

    def __enter__(self) -> Server:
        deadline = time.monotonic() + self.start_s
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server does not start")
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def gpu_flags(model_dir: str) -> list[str]:
    """`gpu.engine_options` as flags of the server."""
    options = gpu.engine_options(model_dir, range(16, LARGEST_GRAPH + 1, 16))
    flags: list[str] = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


async def one_request(client: httpx.AsyncClient, prompt: str, tokens: int) -> tuple[float, float]:
    """(TTFT, TPOT) in seconds."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    body["temperature"] = 0.0
    times = [time.perf_counter()]
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: ") and not line.endswith("[DONE]"):
                times.append(time.perf_counter())
    return times[1] - times[0], (times[-1] - times[1]) / max(len(times) - 2, 1)


async def window(client: httpx.AsyncClient, prompts: list[str], args: argparse.Namespace, seed: int) -> list[Any]:
    """Requests that arrive at random for so many seconds; the same ones for the same seed."""
    rng, requests = random.Random(seed), []
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end:
        requests.append(asyncio.create_task(one_request(client, rng.choice(prompts), args.tokens)))
        await asyncio.sleep(rng.expovariate(args.rate))
    return await asyncio.gather(*requests)


async def step_of(client: httpx.AsyncClient, job: str) -> int:
    return int((await client.get(f"/v1/fine_tuning/jobs/{job}")).json()["step"])


async def post(client: httpx.AsyncClient, path: str, **more: Any) -> dict[str, Any]:
    response = await client.post(path, **more)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


async def status_is(client: httpx.AsyncClient, job: str, status: str, step: int = 0) -> None:
    while (now := (await client.get(f"/v1/fine_tuning/jobs/{job}")).json())["status"] != status or now["step"] < step:
        if now["status"] in ("failed", "succeeded"):
            raise SystemExit(f"the job {now['status']}: {now['error']}")
        await asyncio.sleep(0.05)


async def measure(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Windows without and with the job, in turns: the job is paused in between."""
    prompts = [json.loads(line)["sentence"] + args.suffix for line in args.rows.splitlines()]
    samples: dict[str, list[Any]] = {"without": [], "with": []}
    speeds = []
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        file = await post(client, "/v1/files", files={"file": args.rows.encode()}, data={"purpose": "fine-tune"})
        method = {
            "type": "zeroth_order",
            "zeroth_order": {"hyperparameters": HYPERPARAMETERS, "objective": args.objective},
        }
        body = {"model": "demo", "training_file": file["id"], "method": method}
        job = (await post(client, "/v1/fine_tuning/jobs", json=body))["id"]
        await status_is(client, job, "running", step=30)
        begin, start = await step_of(client, job), time.perf_counter()
        await asyncio.sleep(args.seconds / 2)
        alone = (await step_of(client, job) - begin) / (time.perf_counter() - start)
        await window(client, prompts, argparse.Namespace(**{**vars(args), "seconds": 2.0}), 0)  # nobody times the first
        for number in range(args.rounds):
            for kind in ("with", "without") if number % 2 else ("without", "with"):
                verb, status = ("resume", "running") if kind == "with" else ("pause", "paused")
                if (await client.get(f"/v1/fine_tuning/jobs/{job}")).json()["status"] != status:
                    await post(client, f"/v1/fine_tuning/jobs/{job}/{verb}")
                    await status_is(client, job, status)
                begin, start = await step_of(client, job), time.perf_counter()
                samples[kind] += await window(client, prompts, args, seed=number + 1)
                if kind == "with":
                    speeds.append((await step_of(client, job) - begin) / (time.perf_counter() - start))
    return {"samples": samples, "steps_per_second": speeds, "steps_per_second_alone": alone}


def percentiles(values: list[float]) -> dict[str, float]:
    """p50 and p99 in ms."""
    ordered = sorted(values)
    return {
        "p50": 1e3 * statistics.median(ordered),
        "p99": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
    }


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"requests": {kind: len(found) for kind, found in measured["samples"].items()}}
    for index, name in enumerate(("ttft", "tpot")):
        found = {kind: percentiles([s[index] for s in samples]) for kind, samples in measured["samples"].items()}
        ratios = {p: found["with"][p] / found["without"][p] for p in ("p50", "p99")}
        out[name] = found | {"ratio": ratios}
    out["steps_per_second"] = statistics.median(measured["steps_per_second"])
    return out | {"steps_per_second_alone": measured["steps_per_second_alone"]}


def show(results: dict[str, Any]) -> None:
    table = Table("token budget", *(f"{n} {p}" for n in ("TTFT", "TPOT") for p in ("p50", "p99")), "steps/s", "alone")
    for budget, result in results.items():
        cells = [
            f"{result[name]['without'][p]:.1f} -> {result[name]['with'][p]:.1f} ms ({result[name]['ratio'][p]:.2f}x)"
            for name in ("ttft", "tpot")
            for p in ("p50", "p99")
        ]
        speeds = (f"{result['steps_per_second']:.1f}", f"{result['steps_per_second_alone']:.1f}")
        table.add_row(budget if int(budget) else "none", *cells, *speeds)
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="32,64,128", help="token budgets; 0 is no limit")
    parser.add_argument("--rate", type=float, default=4.0, help="requests that arrive a second")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a request generates")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a window")
    parser.add_argument("--rounds", type=int, default=4, help="windows of each kind")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--shape", choices=SHAPES, help="an OPT of random weights instead of the demo model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="float32")
    add_device(parser)
    args = parser.parse_args()
    choose_device(parser, args)
    cores = sorted(os.sched_getaffinity(0))
    document: dict[str, Any] = {
        "machine": facts.machine(cores) | {"gpu": args.card},
        "settings": {**vars(args), "json": None},
        "results": {},
    }
    scratch = tempfile.TemporaryDirectory()
    choose_workload(args, Path(scratch.name))
    for budget in map(int, args.budgets.split(",")):
        with tempfile.TemporaryDirectory() as directory, Server(budget, Path(directory) / "state", args) as server:
            document["results"][str(budget)] = summarise(asyncio.run(measure(server, args)))
        if args.json:
            args.json.write_text(json.dumps(document, indent=1))
    scratch.cleanup()
    show(document["results"])


def choose_workload(args: argparse.Namespace, scratch: Path) -> None:
    """Sets the model, the training rows, what makes a prompt of a row, and the objective of the job."""
    if args.shape is None:
        args.model_dir, args.rows, args.suffix, args.objective = str(MODEL), REVIEWS.read_text(), " It was", OBJECTIVE
        return
    args.model_dir = str(make_checkpoint(args, scratch))
    args.rows = "".join(json.dumps(row) + "\n" for row in Prompts(SHAPES[args.shape].vocab, 16).records())
    args.suffix = ""
    args.objective = {"name": "classification", "template": "{sentence}", "options": list(OPTION_TEXTS)}


if __name__ == "__main__":
    main()
