"""One process for each contender. It loads its model, then waits at a pipe until the parent asks for some steps.

The parent lets one child run at a time. The others wait in `recv`, with no thread spinning, so contenders share neither
a core nor a thread pool. The parent sends `Window`, or None to stop. The child sends `Ready` once, then a `Timing` for
each window, or `Failed`.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.baselines import STOCK

ENGINES = ("ours", "before")
"""The contenders that are vllm_zo: of this checkout, and of the one that `--before` names."""


@dataclass(frozen=True)
class Window:
    """The steps `start` to `start + count - 1`. A contender skips the steps between windows, or takes them untimed."""

    start: int
    count: int


@dataclass(frozen=True)
class Ready:
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """The wall seconds of each step of a window, in order; its losses; the CPU seconds of the process for the window;
    and the most bytes that torch has allocated on the GPU so far."""

    seconds: list[float]
    losses: list[float]
    cpu_seconds: float
    gpu_bytes: int = 0


@dataclass(frozen=True)
class Failed:
    message: str


def environment(name: str, cores: list[int]) -> dict[str, str]:
    """The environment variables of a child. All children have as many threads as there are cores.

    The parent must set them before the child starts: OpenMP reads them when its library loads.
    """
    listed = ",".join(map(str, cores))
    common = {
        "OMP_NUM_THREADS": str(len(cores)),
        "MKL_NUM_THREADS": str(len(cores)),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if name not in (*ENGINES, *STOCK):
        return common | {"GOMP_CPU_AFFINITY": listed.replace(",", " ")}
    engine = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes nearly all memory, and the baselines need some
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # as `vllm-zo train`: the engine steps only when the child asks it to
    }
    if name in ENGINES:  # the rest as `LLM(..., zo_training=True)` chooses it
        return common | engine
    # Stock vLLM binds its own threads, and by default leaves one core to the front end.
    threads = {"VLLM_CPU_OMP_THREADS_BIND": listed, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    return common | engine | threads | {"VLLM_PLUGINS": ""}


@contextmanager
def variables_of(name: str, cores: list[int]) -> Iterator[None]:
    """Set `environment` for the processes that start in the block. Behind it our own environment is as before."""
    saved = dict(os.environ)
    os.environ.update(environment(name, cores))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def child_main(name: str, conn: Connection, args: Namespace) -> None:
    """The entry point of a child process."""
    try:
        if name in ENGINES:
            if name == "before":  # `vllm_zo` is not loaded yet, so all of it comes from there
                sys.path.insert(0, str(args.before))
            from benchmarks.ours import run_ours

            run_ours(conn, args)
        else:
            run_baseline(name, conn, args)
    except Exception:
        conn.send(Failed(traceback.format_exc()))


def run_baseline(name: str, conn: Connection, args: Namespace) -> None:
    import torch

    from benchmarks.baselines import make
    from benchmarks.shapes import SHAPES, Prompts

    torch.set_num_threads(len(args.cores))
    dtype = getattr(torch, args.dtype)
    hyperparameters = (args.rank, args.interval, args.eps, args.lr, args.seed)
    contender = make(name, args.model_dir, dtype, *hyperparameters, device=args.device)
    prompts = Prompts(SHAPES[args.shape].vocab, args.batch, args.seed)
    details = contender.details | {"pid": os.getpid(), "threads": torch.get_num_threads()}
    if args.device == "cuda":
        details["graphs"] = contender.prepare([prompts.batch(step)[0] for step in range(args.total_steps)])
    finish = torch.cuda.synchronize if args.device == "cuda" else _nothing
    conn.send(Ready(details))
    while (window := conn.recv()) is not None:
        cpu = time.process_time()
        contender.step_index = window.start
        batches = [prompts.batch(step) for step in range(window.start, window.start + window.count)]
        seconds, losses = [], []
        for batch, labels in batches:
            finish()  # a GPU still works on what the host has queued
            start = time.perf_counter()
            losses.append(contender.step(batch, labels))
            finish()
            seconds.append(time.perf_counter() - start)
        conn.send(Timing(seconds, losses, time.process_time() - cpu, gpu_bytes(args.device)))


def _nothing() -> None:
    """On a CPU a step is complete when it returns."""


def gpu_bytes(device: str) -> int:
    """The most bytes that torch has allocated on the GPU in this process; 0 on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else 0
