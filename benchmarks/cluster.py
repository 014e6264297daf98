"""What several engines cost and bring, beside one engine.

    python benchmarks/cluster.py --shape 7m --steps 32                      # log path, and two engines against one
    python benchmarks/cluster.py --shape 125m --steps 8 --parts engines     # one of the parts below alone
    python benchmarks/cluster.py --ray                                      # Ray actors beside child processes
    python benchmarks/cluster.py --simulate --json simulated.json           # up to a thousand engines that are not real
    python benchmarks/cluster.py --plot cluster.png --json simulated.json   # a picture of that, and of bytes a step

On two cores: an engine with both, a cluster of one engine with one core, and a cluster of two with one core each. All
take the same job (LoZO, SST-2's lengths, random weights), turn by turn in one call; idle ones block on a pipe.

    paths        ms a step on one engine with both cores: decided on the device; on the log path with 1 and 2 shards; in
                 a process of its own, behind a coordinator
    engines      ms a step with K=2 directions and 2 shards: one engine with one core, two engines with one core each.
                 And what the machine lets two engines do that have nothing to do with each other: one job each, at the
                 same time, on a core each
    messages     bytes and number of messages a step of two engines, K=1; and how long they wait between two steps
    recovery     seconds from kill -9 of an engine to its first shard after the restart; steps lost

`--ray`: two engines with one thread each as children, and as Ray actors, on the same two cores: round trip of an empty
message, ms a step (K=2, 2 shards), messages and bytes a step, which are the same on both roads.

The simulation drives the real coordinator. A step is worth `step_s` on one engine and is cut into one shard an engine.
Speeds (log-normal, sigma 0.1), latencies (log-uniform, one for each engine) and deaths (each engine once in `--mtbf`
seconds, half a minute to restart) are drawn. The time that the coordinator's own code takes is real, and passes on the
virtual clock. Efficiency is step_s / (sum of the engines' speeds x time of a step).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.facts import chosen_cores, machine
from benchmarks.shapes import OPTION_TEXTS, SHAPES, Prompts

DEVICE, ONE = "device path", "K=2: one engine, 1 core"
PARTS = ("paths", "engines", "messages", "recovery")
COUNTS = (1, 8, 64, 256, 1000)
STEPS_S = (0.03, 0.3, 3.0)
LATENCY_S = {"near": (1e-4, 1e-3), "far": (1e-4, 1e-1)}
"""One way, of the nearest and of the farthest engine."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, default="7m")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="Of the measurement. Default: all.")
    parser.add_argument("--steps", type=int, default=40, help="Steps of a turn.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recoveries", type=int, default=5, help="How often an engine is killed.")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--cores", help="Two cores. Default: the first two.")
    parser.add_argument(
        "--mtbf", type=float, default=3600.0, help="Simulation: mean seconds between two deaths of one."
    )
    parser.add_argument("--json", type=Path, help="Where the figures go; for --plot, where those of --simulate are.")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    args = parser.parse_args()
    args.cores = chosen_cores(args.cores)
    if args.plot:
        plot(json.loads(args.json.read_text()), args.plot)
        return
    result = simulate(args) if args.simulate else measure_ray(args) if args.ray else measure(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


# --- real engines -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.shapes import write_checkpoint
    from vllm_zo import LLM, Classification, Cluster, LoZO, apply_cpu_defaults

    os.sched_setaffinity(0, args.cores)
    prompts = Prompts(SHAPES[args.shape].vocab, args.batch)
    job: dict[str, Any] = {
        "train": prompts.records(), "objective": Classification("{sentence}", list(OPTION_TEXTS)), "progress": False,
        "learning_rate": 1e-7, "batch_size": args.batch, "steps": args.steps,
    }  # fmt: skip
    engine: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "zo_training": {"slots": 4},
        "num_gpu_blocks_override": 256,
    }
    result: dict[str, Any] = {"machine": machine(args.cores), "ms": {}}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = str(write_checkpoint(SHAPES[args.shape], "float32", Path(folder) / "model"))

        def cluster(*devices: list[int]) -> Any:
            return stack.enter_context(Cluster(model, len(devices), devices=devices, **engine))

        first, second = args.cores[:1], args.cores[1:2]
        two = cluster(first, second) if set(args.parts) - {"paths"} else None
        if "engines" in args.parts:
            one, other = cluster(first), cluster(second)
            twice = {**job, "method": LoZO(queries=2), "shards": 2}
            pool = stack.enter_context(ThreadPoolExecutor(2))

            def apart() -> Any:
                runs = list(pool.map(lambda members: members.finetune(**twice), (one, other)))
                return max(runs, key=lambda run: run.history[-1]["seconds"])

            contenders = {
                ONE: lambda: one.finetune(**twice),
                "K=2: two engines, 1 core each": lambda: two.finetune(**twice),
                "K=2: two engines, a job each": apart,
            }
            result["ms"] |= take_turns(contenders, args.rounds)
        if "paths" in args.parts:
            apply_cpu_defaults()
            # After the others: vLLM binds this process to cores, and it has their coordinators.
            llm: Any = LLM(model, **engine)
            one_wide = cluster(args.cores)
            contenders = {
                DEVICE: lambda: llm.finetune(**job),
                "log path, 1 shard": lambda: llm.finetune(**job, shards=1),
                "log path, 2 shards": lambda: llm.finetune(**job, shards=2),
                "cluster of one engine, 1 shard": lambda: one_wide.finetune(**job, shards=1),
            }
            result["ms"] |= take_turns(contenders, args.rounds)
        report_times(args, result["ms"])
        if "messages" in args.parts:
            result["messages"] = count_messages(lambda: two.finetune(**job, shards=2))
            report_messages(result["messages"])
        if "recovery" in args.parts:
            endless = {**job, "steps": 100_000, "divergence_factor": None}
            result["recovery_s"] = recover(two, endless, args.recoveries)
            print(f"kill -9 to first shard: {', '.join(f'{s:.1f}' for s in result['recovery_s'])} s, 0 steps lost")
    return result


def measure_ray(args: argparse.Namespace) -> dict[str, Any]:
    import ray

    from benchmarks.shapes import write_checkpoint
    from vllm_zo import Classification, Cluster, LoZO

    os.sched_setaffinity(0, args.cores)
    prompts = Prompts(SHAPES[args.shape].vocab, args.batch)
    job: dict[str, Any] = {
        "train": prompts.records(), "objective": Classification("{sentence}", list(OPTION_TEXTS)), "progress": False,
        "learning_rate": 1e-7, "batch_size": args.batch, "steps": args.steps, "method": LoZO(queries=2), "shards": 2,
    }  # fmt: skip
    engine: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "num_gpu_blocks_override": 256}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_checkpoint(SHAPES[args.shape], "float32", Path(folder) / "model"))
        with (
            Cluster(model, 2, devices=[args.cores[:1], args.cores[1:2]], **engine) as children,
            Cluster(model, 2, ray="auto", **engine) as actors,
        ):
            child, actor = children.engines[0], actors.engines[0].actor
            trips = {
                "children": round_trips(lambda: child.call("_settle")),  # an idle engine has nothing to do
                "Ray actors": round_trips(lambda: ray.get(actor.tell.remote(0, -1, ()))),
            }
            for name, ms in trips.items():
                print(f"{name:12} round trip {median(ms):.2f} ms ({ms[len(ms) // 20]:.2f}-{ms[-len(ms) // 20]:.2f})")
            contenders = {"children": lambda: children.finetune(**job), "Ray actors": lambda: actors.finetune(**job)}
            times = take_turns(contenders, args.rounds)
            ratios = sorted(b / a for a, b in zip(*times.values(), strict=True))
            for name, rounds in times.items():
                print(f"{name:12} {median(rounds):.2f} ms a step ({min(rounds):.2f}-{max(rounds):.2f})")
            print(f"Ray actors / children: {median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")
            report_messages(sent := count_messages(contenders["children"]))
    ray.shutdown()
    return {"machine": machine(args.cores), "round_trip_ms": trips, "ms": times, "messages": sent}


def round_trips(call: Callable[[], Any], times: int = 500) -> list[float]:
    """Milliseconds of each call, sorted."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return sorted(1e3 * s for s in seconds)


def take_turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Median ms a step in each round. The first quarter of a turn is not counted."""
    times: dict[str, list[float]] = defaultdict(list)
    for index in range(rounds + 1):
        for name, run in contenders.items():
            seconds = [record["seconds"] for record in run().history]
            steps = [after - before for before, after in pairwise(seconds)]
            if index:  # round 0 warms up
                times[name].append(1e3 * median(steps[len(steps) // 4 :]))
    return times


def count_messages(run: Callable[[], Any]) -> dict[str, Any]:
    """Of a run of a local cluster: kind of message -> number a step and mean bytes, both ways. And, as `gap_ms`, the
    median time between the last answer of a step and the first shard of the next."""
    from vllm_zo.entrypoints.cluster.local import LocalEngine

    sizes: dict[str, list[int]] = defaultdict(list)
    times: list[tuple[str, float]] = []
    send, hear = LocalEngine.send, LocalEngine.hear

    def note(message: Any) -> None:
        times.append((type(message).__name__, time.perf_counter()))
        sizes[type(message).__name__].append(len(pickle.dumps(message)))

    def sending(self: Any, message: Any) -> None:
        send(self, message)
        note(message)

    def hearing(self: Any) -> Any:
        note(message := hear(self))
        return message

    LocalEngine.send, LocalEngine.hear = sending, hearing  # type: ignore[method-assign]
    steps = len(run().history)
    LocalEngine.send, LocalEngine.hear = send, hear  # type: ignore[method-assign]
    work = [(kind, at) for kind, at in times if kind in ("Score", "Scored")]
    gaps = [after - before for (a, before), (b, after) in pairwise(work) if (a, b) == ("Scored", "Score")]
    kinds = ("Score", "Scored", "Commit")
    sent = {kind: {"a_step": len(sizes[kind]) / steps, "bytes": sum(sizes[kind]) / len(sizes[kind])} for kind in kinds}
    return {"sent": sent, "gap_ms": 1e3 * median(gaps)}


def recover(cluster: Any, job: dict[str, Any], times: int) -> list[float]:
    """Seconds from kill -9 of the second engine to its first shard after the restart, with the job going on."""
    seconds: list[float] = []

    def watch(run: Any, record: dict[str, Any]) -> None:
        victim = cluster.engines[1]
        if record["step"] == 20:
            victim.restarts = 0
            os.kill(victim.process.pid, signal.SIGKILL)
            watch.killed_at = time.monotonic()  # type: ignore[attr-defined]
            watch.left = False  # type: ignore[attr-defined]
        elif record["step"] > 20:
            here = run.engines[victim.name]
            watch.left |= not here["ready"]  # type: ignore[attr-defined]
            if watch.left and here["ready"] and here["shards"]:  # type: ignore[attr-defined]
                seconds.append(time.monotonic() - watch.killed_at)  # type: ignore[attr-defined]
                watch.left = False  # type: ignore[attr-defined]
                run.stop()

    for _ in range(times):
        run = cluster.finetune(**job, shards=2, callbacks=[watch])
        steps = [record["step"] for record in run.history]
        assert steps == list(range(1, len(steps) + 1)), "a step was lost"
    return seconds


def report_times(args: argparse.Namespace, times: dict[str, list[float]]) -> None:
    print(f"{args.shape}, batch {args.batch}, float32, {machine(args.cores)['cpu']}, cores {args.cores}")
    for name, rounds in times.items():
        against = ONE if name.startswith("K=2") else DEVICE
        ratios = sorted(mine / theirs for mine, theirs in zip(rounds, times[against], strict=True))
        spread = f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(f"{name:32} {median(rounds):8.2f} ms   x {spread}", flush=True)


def report_messages(messages: dict[str, Any]) -> None:
    for kind, numbers in messages["sent"].items():
        print(f"{kind:8} {numbers['a_step']:.1f} a step, {numbers['bytes']:.0f} bytes", flush=True)
    print(f"{messages['gap_ms']:.2f} ms from the last answer of a step to the first shard of the next", flush=True)


# --- engines that are not real ----------------------------------------------------------------------------------------


def simulate(args: argparse.Namespace) -> list[dict[str, Any]]:
    one_simulation("near", 0.1, 2, args, True)  # torch's first calls take seconds
    rows = [
        one_simulation(place, step_s, engines, args, speculate)
        for place in LATENCY_S
        for step_s in STEPS_S
        for engines in COUNTS
        for speculate in (True, False)
    ]
    print("latency   step on one engine   engines   efficiency, speculative leases   without   coordinator ms a step")
    for with_, without in zip(rows[::2], rows[1::2], strict=True):
        print(
            f"{with_['latency']:<10}{with_['step_s']:>16} s {with_['engines']:>9} {with_['efficiency']:>32.2f} "
            f"{without['efficiency']:>9.2f} {with_['coordinator_ms']:>23.1f}"
        )
    return rows


def one_simulation(
    place: str, step_s: float, engines: int, args: argparse.Namespace, speculate: bool
) -> dict[str, Any]:
    from benchmarks.simulated_cluster import MODULES, Network, Trouble, make_job
    from vllm_zo import LoZO
    from vllm_zo.cluster import leases
    from vllm_zo.cluster.protocol import FromEngine, Join, Joined, Score, Scored, Stop, Stopped, ToEngine

    class Quick:
        """Answers at once, with cells that are no loss of anything."""

        def tell(self, message: ToEngine) -> list[FromEngine]:
            if isinstance(message, Score):
                row = [0.1] * (2 * len(message.example_ids))
                return [Scored(message.epoch, message.number, [row] * len(message.plan.probes))]
            if isinstance(message, Join):
                return [Joined(message.epoch, MODULES, None, "fake 1")]
            return [Stopped(message.epoch)] if isinstance(message, Stop) else []

    class Drawn(Network):
        """Engines of unequal speed and distance."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            draws = random.Random(1)
            self.speed: dict[str, float] = defaultdict(lambda: draws.lognormvariate(0.0, 0.1))
            nearest, farthest = map(math.log, LATENCY_S[place])
            self.distance: dict[str, float] = defaultdict(lambda: math.exp(draws.uniform(nearest, farthest)))
            self.spent = 0.0
            super().__init__(*arguments, **options)

        def latency(self, name: str) -> float:
            return self.distance[name] * self.random.uniform(0.8, 1.2)

        def work(self, name: str, score: Score) -> float:
            share = len(score.plan.probes) * len(score.example_ids) / cells
            return step_s * share / self.speed[name] * self.random.uniform(0.95, 1.05)

        def _spent(self, began: float) -> None:
            self.spent += time.perf_counter() - began
            super()._spent(began)

    queries = examples = 32
    cells = 2 * queries * examples
    steps = 40
    normal = leases.LATE_FACTOR
    leases.LATE_FACTOR = normal if speculate else math.inf
    try:
        with tempfile.TemporaryDirectory() as folder:
            directory = make_job(
                Path(folder) / "job", validation=0, shards=engines, steps=steps, batch_size=examples,
                method=LoZO(queries=queries), divergence_factor=None,
            )  # fmt: skip
            trouble = Trouble(death_s=args.mtbf, restart_s=15.0)
            network = Drawn(directory, engines, trouble, Quick, counts_coordinator=True)
            job = network.run().job
    finally:
        leases.LATE_FACTOR = normal
    assert job.status == "succeeded"
    return {
        "latency": place,
        "step_s": step_s,
        "engines": engines,
        "speculate": speculate,
        "efficiency": step_s * steps / (sum(network.speed.values()) * network.now),
        "coordinator_ms": 1e3 * network.spent / steps,
        "deaths": network.deaths,
        "messages": network.sent / steps,
    }


# --- a picture --------------------------------------------------------------------------------------------------------

LLAMAS = {"7B": (4096, 11008, 32, 6.74e9), "13B": (5120, 13824, 40, 13.02e9)}
"""Llama 2: hidden size, width of the MLP, layers, weights."""
ADAPTER_RANK = 8


def synchronised_bytes(name: str) -> dict[str, float]:
    """Bytes that a step brings to one engine: all weights in 16 bits, an adapter of all linear layers in 16 bits, and
    our messages (K=1, batch 16, two shards, as pickled; measured by this program). Ours do not depend on the model."""
    hidden, mlp, layers, weights = LLAMAS[name]
    adapter = ADAPTER_RANK * layers * (4 * 2 * hidden + 3 * (hidden + mlp))
    return {"weights": 2 * weights, f"adapter, rank {ADAPTER_RANK}": 2.0 * adapter, "vllm_zo": OURS_BYTES}


OURS_BYTES = 1010.0
"""Score, Scored and Commit of one engine together."""


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: bytes a step to one engine, on a log axis. Right: the simulated efficiency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for offset, name in enumerate(LLAMAS):
        sizes = synchronised_bytes(name)
        places = [index + 0.35 * offset for index in range(len(sizes))]
        left.bar(places, list(sizes.values()), width=0.33, label=name)
        left.set_xticks([place - 0.17 for place in places], list(sizes))
    left.set_yscale("log")
    left.set_ylabel("bytes a step to one engine")
    left.legend(title="Llama 2", frameon=False)
    for colour, step_s in zip(("C0", "C1", "C2"), STEPS_S, strict=True):
        for place, line in {"near": "o-", "far": "o:"}.items():
            chosen = [r for r in rows if r["step_s"] == step_s and r["latency"] == place and r["speculate"]]
            drawn = right.plot([r["engines"] for r in chosen], [r["efficiency"] for r in chosen], line, color=colour)
        drawn[0].set_label(f"{step_s:g} s")
    right.set_xscale("log")
    right.set_ylim(0, 1)
    right.set_xlabel("engines (simulated); dotted: up to 100 ms away, else 1 ms")
    right.set_ylabel("efficiency")
    right.legend(title="step on one engine", frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
