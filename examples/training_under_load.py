"""The engine serves while it trains: latencies of requests without a job, and with one.

    python examples/training_under_load.py

Serving comes first. `slowdown` says how many times as long training may make what requests wait for.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
MODEL = str(HERE / "demo" / "model")
TRAIN = HERE / "demo" / "reviews" / "train.jsonl"
REQUESTS = int(sys.argv[1]) if len(sys.argv) > 1 else 10


def main() -> None:
    from vllm_zo import apply_cpu_defaults

    # An engine in a process of its own (vLLM's default) trains while this process does something else. An engine in
    # this process would work only during a call.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    apply_cpu_defaults()
    from vllm import SamplingParams

    from vllm_zo import LLM, Classification

    llm = LLM(MODEL, max_model_len=256, dtype="float32", zo_training={"slowdown": 1.5})

    def latencies(lora_request=None) -> list[float]:
        taken = []
        for _ in range(REQUESTS):
            start = time.perf_counter()
            llm.generate(
                "the soup was cold and",
                SamplingParams(max_tokens=16, ignore_eos=True),
                use_tqdm=False,
                lora_request=lora_request,
            )
            taken.append(time.perf_counter() - start)
        return taken

    latencies()  # warm up
    print(f"alone:              median {statistics.median(latencies()) * 1e3:.0f} ms for 16 tokens")
    run = llm.finetune(
        train=TRAIN,
        objective=Classification("{sentence} It was", [" terrible", " great"]),
        learning_rate=3e-4,
        steps=100_000,
        publish_interval=5,
        progress=False,
        wait=False,
    )
    start = time.perf_counter()
    print(f"with a job running: median {statistics.median(latencies()) * 1e3:.0f} ms")
    run.poll()
    steps = len(run.history)
    print(f"meanwhile {steps} training steps in {time.perf_counter() - start:.1f} s")
    while not run.published:  # the fifth step publishes the first version
        time.sleep(0.1)
        run.poll()
    print(f"its newest version: median {statistics.median(latencies(run.lora_request)) * 1e3:.0f} ms")
    run.cancel()


if __name__ == "__main__":
    main()
