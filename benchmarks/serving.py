"""What a fine-tuning job costs the requests that the server answers meanwhile, and how fast the job then runs.

    python benchmarks/serving.py                              # the demo model, --zo-slowdown 1.1
    python benchmarks/serving.py --slowdowns 1.1,2,0 --shares 50 --rounds 6 --json serving.json
    python benchmarks/serving.py --shape 13b --dtype float16 --slowdowns 1.1,0    # random weights
    python benchmarks/serving.py --model "$(python examples/models.py smollm2)" --dtype bfloat16

Each slowdown has a real server (`vllm-zo serve --zo-slowdown`). The client is vLLM's own `vllm bench serve`, called as
a function in this process, on the cores that serve: streamed completions that arrive at random (Poisson) at shares of
the rate at which, without a job, `--together` of them are always under way. Windows with and without a job take turns,
and both windows of a round have the same arrivals. TTFT and TPOT are as that program defines them, for each request. A
ratio divides the pooled percentile with the job by the one without, from the same server. The idle share is that of the
time in the windows without a job during which no request is under way, as the client sees it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
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
from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

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
"""The longest start, in seconds. On a GPU a first start compiles the model and captures its graphs."""
LARGEST_GRAPH = 1024
"""Tokens of the largest CUDA graph."""


class Server:
    """A process of `vllm-zo serve` on a port of its own."""

    def __init__(self, slowdown: float, state_dir: Path, args: argparse.Namespace) -> None:
        self.start_s = START_S[args.device]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))  # port 0: the system chooses a free one
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            "-c",
            "from vllm_zo.entrypoints.cli.app import main; main()",
            "serve",
            args.model_dir,
        ]
        length = max(256, args.prompt + args.tokens + 1)
        command += ["--served-model-name", "demo", "--dtype", args.dtype, "--max-model-len", str(length)]
        command += ["--port", str(port)]
        command += ["--zo-state-dir", str(state_dir), "--zo-slowdown", str(slowdown), "--disable-uvicorn-access-log"]
        if args.device == "cuda":
            command += gpu_flags(args.model_dir)
        variables = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # as in use: the engine has a process of its own
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


def client_args(server: Server, args: argparse.Namespace, requests: int, rate: float, seed: int) -> argparse.Namespace:
    """Arguments of `vllm bench serve`."""
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    flags = ["--model", args.model_dir, "--served-model-name", "demo", "--base-url", server.url, "--ignore-eos"]
    flags += [
        "--dataset-name",
        "random",
        "--random-input-len",
        str(args.prompt),
        "--random-output-len",
        str(args.tokens),
    ]
    flags += ["--num-prompts", str(requests), "--request-rate", str(rate), "--burstiness", str(args.burstiness)]
    flags += ["--seed", str(seed), "--disable-tqdm"]
    flags += ["--save-detailed", "--temperature", "0"]
    return parser.parse_args(flags)


async def window(
    server: Server, args: argparse.Namespace, rate: float, seed: int, requests: int | None = None
) -> tuple[list[tuple[float, float]], float]:
    """(TTFT, TPOT) in seconds of the requests of a window, and the share of its time in which there was none.

    The same seed gives the same requests and pauses.

    Args:
        requests: how many; None: what comes in `--seconds`.
    """
    requests = requests or max(round(rate * args.seconds), 1)
    with contextlib.redirect_stdout(io.StringIO()):
        result = await serve.main_async(client_args(server, args, requests, rate, seed))
    if result["completed"] < requests:
        raise SystemExit(f"{requests - result['completed']} of {requests} requests failed: {result['errors'][:1]}")
    answers = list(zip(result["start_times"], result["ttfts"], result["itls"], strict=True))
    idle = idle_share([(start, start + ttft + sum(gaps)) for start, ttft, gaps in answers])
    # TPOT as `vllm bench serve` has it: the time after the first token over the number of further tokens.
    return [(ttft, sum(gaps) / (args.tokens - 1)) for _, ttft, gaps in answers], idle


def idle_share(busy: list[tuple[float, float]]) -> float:
    """The share of the time from the first begin to the last end that lies in none of these (begin, end)."""
    busy = sorted(busy)
    idle, until = 0.0, busy[0][0]
    for begin, end in busy:
        idle, until = idle + max(begin - until, 0.0), max(until, end)
    return idle / (until - busy[0][0])


async def saturation(server: Server, args: argparse.Namespace) -> float:
    """Requests a second that are answered while `--together` of them are always under way.

    With as many as the engine takes the rate would be higher, and three quarters of it more than it could answer as
    they come: a request that is answered alone takes more of the engine's time than one among a hundred.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        measured = client_args(server, args, args.saturating, float("inf"), 0)
        measured.max_concurrency = args.together
        result = await serve.main_async(measured)
    return float(result["request_throughput"])


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
    """Measure windows without and with the job at each share of the saturating rate. The job pauses during those
    without."""
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        with contextlib.redirect_stdout(io.StringIO()):
            await serve.main_async(client_args(server, args, 32, float("inf"), 0))  # warms the server up
        saturating = args.rate or await saturation(server, args)
        job = await create_job(client, args)
        await status_is(client, job, "running", step=30)
        begin, start = await step_of(client, job), time.perf_counter()
        await asyncio.sleep(args.seconds / 2)
        alone = (await step_of(client, job) - begin) / (time.perf_counter() - start)
        say(f"saturated by {saturating:.1f} requests a second; {alone:.2f} steps a second alone")
        shares = {}
        for share in (float(percent) / 100 for percent in args.shares.split(",")):
            shares[str(share)] = await measure_share(server, client, job, args, share, saturating)
        return {"saturating_rate": saturating, "steps_per_second_alone": alone, "shares": shares}


def say(text: str) -> None:
    """Progress; the table goes to standard output."""
    print(text, file=sys.stderr, flush=True)


async def create_job(client: httpx.AsyncClient, args: argparse.Namespace) -> str:
    file = await post(client, "/v1/files", files={"file": args.rows.encode()}, data={"purpose": "fine-tune"})
    options = {"hyperparameters": HYPERPARAMETERS, "objective": args.objective}
    method = {"type": "zeroth_order", "zeroth_order": options}
    body = {"model": "demo", "training_file": file["id"], "method": method}
    return str((await post(client, "/v1/fine_tuning/jobs", json=body))["id"])


async def measure_share(
    server: Server, client: httpx.AsyncClient, job: str, args: argparse.Namespace, share: float, saturating: float
) -> dict[str, Any]:
    samples: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    speeds, slowdowns, idle = [], [], []
    for number in range(args.rounds):
        # The order alternates, so that a machine that slows down changes both kinds alike.
        for kind in ("with", "without") if number % 2 else ("without", "with"):
            verb, status = ("resume", "running") if kind == "with" else ("pause", "paused")
            if (await client.get(f"/v1/fine_tuning/jobs/{job}")).json()["status"] != status:
                await post(client, f"/v1/fine_tuning/jobs/{job}/{verb}")
                await status_is(client, job, status)
            begin, start = await step_of(client, job), time.perf_counter()
            each = args.requests and -(-args.requests // args.rounds)
            found, without_any = await window(server, args, share * saturating, number + 1, each)
            samples[kind] += found
            if kind == "without":
                idle.append(without_any)
            else:
                speeds.append((await step_of(client, job) - begin) / (time.perf_counter() - start))
                slowdowns.append(await measured_slowdown(client))
            so_far = {name: percentiles([s[i] for s in samples[kind]]) for i, name in enumerate(("ttft", "tpot"))}
            say(f"{share:.0%} {kind}: {len(samples[kind])} requests, {so_far}, steps/s {speeds}, slowdown {slowdowns}")
    figures = {"rate": share * saturating, "samples": samples, "idle": idle}
    return figures | {"steps_per_second": speeds, "slowdowns": slowdowns}


async def measured_slowdown(client: httpx.AsyncClient) -> float | None:
    """The server's own figure, of its engine steps over the last minute."""
    lines = (await client.get("/metrics")).text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith("vllm_zo:slowdown ")), None)


def percentiles(values: list[float]) -> dict[str, float]:
    """p50 and p99 in ms, of values in seconds."""
    ordered = sorted(values)
    return {
        "p50": 1e3 * statistics.median(ordered),
        "p99": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
    }


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    return measured | {"shares": {share: summarise_share(found) for share, found in measured["shares"].items()}}


def summarise_share(measured: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"requests": {kind: len(found) for kind, found in measured["samples"].items()}}
    for index, name in enumerate(("ttft", "tpot")):
        found = {kind: percentiles([s[index] for s in samples]) for kind, samples in measured["samples"].items()}
        ratios = {p: found["with"][p] / found["without"][p] for p in ("p50", "p99")}
        out[name] = found | {"ratio": ratios}
    out["steps_per_second"] = statistics.median(measured["steps_per_second"])
    out["idle"] = statistics.median(measured["idle"])
    return out | {"rate": measured["rate"], "slowdowns": measured["slowdowns"]}


def show(results: dict[str, Any]) -> None:
    table = Table(
        "slowdown",
        "load",
        *(f"{n} {p}" for n in ("TTFT", "TPOT") for p in ("p50", "p99")),
        "steps/s",
        "idle share of alone",
    )
    for slowdown, result in results.items():
        for share, found in result["shares"].items():
            cells = [
                f"{found[name]['without'][p]:.1f} -> {found[name]['with'][p]:.1f} ms ({found[name]['ratio'][p]:.2f}x)"
                for name in ("ttft", "tpot")
                for p in ("p50", "p99")
            ]
            load = f"{float(share):.0%}, {found['rate']:.1f}/s"
            alone = result["steps_per_second_alone"]
            speeds = (f"{found['steps_per_second']:.1f}", f"{found['idle']:.0%} of {alone:.1f}")
            table.add_row(slowdown if float(slowdown) else "none", load, *cells, *speeds)
    Console(width=180).print(table)


def add_requests(parser: argparse.ArgumentParser) -> None:
    """Add the options that `client_args` reads."""
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a request generates")
    parser.add_argument("--burstiness", type=float, default=1.0, help="1: Poisson; below 1 requests come in bursts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slowdowns", default="1.1", help="values of --zo-slowdown; 0 is no target")
    parser.add_argument("--shares", default="25,50,75", help="percent of the saturating rate")
    parser.add_argument("--rate", type=float, help="the saturating rate, if it is known: requests a second")
    parser.add_argument("--saturating", type=int, default=300, help="requests that measure the saturating rate")
    parser.add_argument("--together", type=int, default=16, help="requests under way at the saturating rate")
    add_requests(parser)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a window")
    parser.add_argument("--requests", type=int, help="of each kind at each share, in place of --seconds")
    parser.add_argument("--rounds", type=int, default=2, help="windows of each kind")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--model", default=str(MODEL), help="directory of the model")
    parser.add_argument("--shape", choices=SHAPES, help="a model of random weights instead of the model")
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
    for slowdown in map(float, args.slowdowns.split(",")):
        with tempfile.TemporaryDirectory() as directory, Server(slowdown, Path(directory) / "state", args) as server:
            document["results"][str(slowdown)] = summarise(asyncio.run(measure(server, args)))
        if args.json:
            args.json.write_text(json.dumps(document, indent=1))
    scratch.cleanup()
    show(document["results"])


def choose_workload(args: argparse.Namespace, scratch: Path) -> None:
    """Set the model, the training records and the objective of the job."""
    if args.shape is None:
        args.model_dir, args.rows, args.objective = args.model, REVIEWS.read_text(), OBJECTIVE
        return
    args.model_dir = str(make_checkpoint(args, scratch))
    args.rows = "".join(json.dumps(row) + "\n" for row in Prompts(SHAPES[args.shape].vocab, 16).records())
    args.objective = {"name": "classification", "template": "{sentence}", "options": list(OPTION_TEXTS)}


if __name__ == "__main__":
    main()
