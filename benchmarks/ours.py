"""vllm_zo as a contender: the one place where the benchmark touches the package's public API.

The job runs its steps one after another inside the engine. A callback after each step does what the loop of
`children.run_baseline` does: it notes the time, and at the end of a window it answers the parent and waits for the next
window. The engine core is in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), where it works only when the caller steps
it. So the engine is idle while the callback waits. The callback does not time the steps between two windows.
On a GPU the next step has already begun when a record arrives. So the time of a step is the time between two records,
and windows lie an interval apart, which fills the pipeline again before the clock counts.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import gpu
from benchmarks.children import Ready, Timing, Window, gpu_bytes
from benchmarks.shapes import OPTION_TEXTS, SHAPES, Prompts


class WindowClock:
    """A callback of `finetune` that splits the job's steps into the windows that the parent asks for."""

    def __init__(self, conn: Connection, device: str) -> None:
        self.conn, self.device = conn, device
        self._next_window()

    def _next_window(self) -> None:
        self.window: Window | None = self.conn.recv()
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.cpu = time.process_time()
        self.last = time.perf_counter()

    def __call__(self, run: Any, record: dict[str, Any]) -> None:
        if self.window is None or "eval_loss" in record:
            return
        now = time.perf_counter()
        if record["step"] - 1 >= self.window.start:  # records count completed steps
            self.seconds.append(now - self.last)
            self.losses.append(record["loss"])
        self.last = now
        if len(self.seconds) == self.window.count:
            cpu = time.process_time() - self.cpu
            self.conn.send(Timing(self.seconds, self.losses, cpu, gpu_bytes(self.device)))
            self._next_window()


def engine_details(llm: Any) -> dict[str, Any]:
    """The settings that vLLM chose by itself."""
    config = llm.llm_engine.vllm_config
    return {
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "v2_model_runner": bool(config.use_v2_model_runner),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "graphs_up_to": config.compilation_config.max_cudagraph_capture_size,
    }


def run_ours(conn: Connection, args: Namespace) -> None:
    """Answer every `Window` with a `Timing` until None comes. `args` are the options of core_step.py."""
    from vllm_zo import LLM, Classification, FactorizedMeZO, LoZO, MeZO

    prompts = Prompts(SHAPES[args.shape].vocab, args.batch, args.seed)
    options: dict[str, Any] = {}
    if args.device == "cuda":
        options = gpu.engine_options(args.model_dir, map(prompts.tokens, range(args.total_steps)), 2 * args.batch)
    method: Any = LoZO(rank=args.rank, interval=args.interval, eps=args.eps)
    zo_training: Any = True
    if args.method == "factorized-mezo":
        from vllm_zo.slot_fit import SLOT_RANKS

        method = FactorizedMeZO(rank=args.rank, eps=args.eps)
        zo_training = {"slot_rank": min(r for r in SLOT_RANKS if r >= args.rank)}
    if args.method == "mezo":
        method = MeZO(eps=args.eps)
    llm = LLM(args.model_dir, dtype=args.dtype, zo_training=zo_training, **options)
    conn.send(Ready({"pid": os.getpid(), "space": args.space, **engine_details(llm)}))
    llm.finetune(
        train=prompts.records(),
        objective=Classification(template="{sentence}", options=list(OPTION_TEXTS)),
        method=method,
        learning_rate=args.lr,
        batch_size=args.batch,
        steps=args.total_steps,
        seed=args.seed,
        update_space=args.space,
        callbacks=[WindowClock(conn, args.device)],
        progress=False,
    )
