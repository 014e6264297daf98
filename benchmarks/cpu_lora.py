"""Milliseconds that LoRA adds to a forward on CPU: vLLM's stock wrapper, `patches/0005`, and ours.

    python benchmarks/cpu_lora.py [--dtype float32] [--rank 16] [--rounds 7]

It times every LoRA product of one OPT-125M forward (12 layers; q, k, v packed, out, fc1, fc2) without the base
products. A batch is a prefill of 512 tokens in 16 requests or a decode of 16 requests. It has 1, 2 or 8 adapters, or 8
adapters on half of the requests and none on the others. Contenders take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
PATCH = ROOT / "patches" / "0005-cpu-grouped-lora.patch"
PATCHED_FILE = Path("vllm/lora/punica_wrapper/punica_cpu.py")
LAYERS, HIDDEN, FFN = 12, 768, 3072
PRODUCTS = ((HIDDEN, (HIDDEN,) * 3), (HIDDEN, (HIDDEN,)), (HIDDEN, (FFN,)), (FFN, (HIDDEN,)))
"""(inputs, outputs of each slice) of the linear layers of one OPT-125M layer."""
REQUESTS, PREFILL_TOKENS, SLOTS = 16, 512, 8
BATCHES = {
    "1 adapter": [1] * REQUESTS,
    "2 adapters": [1 + i % 2 for i in range(REQUESTS)],
    "8 adapters": [1 + i % 8 for i in range(REQUESTS)],
    "8 adapters, half plain": [0 if i % 2 else 1 + i // 2 for i in range(REQUESTS)],
}
"""The adapter of each request; 0 stands for none."""


def patched_wrapper() -> Any:
    """The class PunicaWrapperCPU as `patches/0005` leaves it. The installed vLLM stays as it is."""
    from vllm.lora.punica_wrapper import punica_cpu

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / PATCHED_FILE
        file.parent.mkdir(parents=True)
        shutil.copy(punica_cpu.__file__, file)
        include = ["git", "apply", f"--include={PATCHED_FILE}", str(PATCH)]
        subprocess.run(include, cwd=directory, check=True, env={**os.environ, "GIT_CEILING_DIRECTORIES": directory})
        spec = importlib.util.spec_from_file_location("vllm.lora.punica_wrapper.patched", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.PunicaWrapperCPU


def contenders() -> dict[str, Any]:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from vllm_zo.worker.cpu.lora import GroupedPunicaWrapper

    return {"stock": PunicaWrapperCPU, "patch": patched_wrapper(), "vllm_zo": GroupedPunicaWrapper}


def forward_of(wrapper_class: Any, adapters: list[int], tokens_each: int, rank: int, dtype: Any) -> Callable[[], None]:
    """A function that runs all LoRA products of one forward."""
    import torch
    from vllm.lora.layers import LoRAMapping

    tokens = tuple(a for a in adapters for _ in range(tokens_each))
    wrapper = wrapper_class(max(len(tokens), 64), REQUESTS, "cpu")
    mapping = LoRAMapping(tokens, tuple(adapters), is_prefill=tokens_each > 1)
    wrapper.update_metadata(mapping, [*range(1, SLOTS + 1)], SLOTS + 1, 50272)
    work = []
    for inputs, outputs in PRODUCTS:
        a = tuple(torch.randn(SLOTS, 1, rank, inputs).to(dtype) for _ in outputs)
        b = tuple(torch.randn(SLOTS, 1, out, rank).to(dtype) for out in outputs)
        x, y = torch.randn(len(tokens), inputs).to(dtype), torch.zeros(len(tokens), sum(outputs), dtype=dtype)
        work.append(partial(wrapper.add_lora_linear, y, x, a, b, 1.0, outputs))

    def forward() -> None:
        for _ in range(LAYERS):
            for product in work:
                product()

    return forward


def measure(forwards: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median milliseconds of each forward. They take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    for round_number in range(rounds + 1):
        for name, forward in forwards.items():
            start = time.perf_counter()
            forward()
            if round_number:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) * 1e3 for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

    import torch

    from benchmarks.facts import chosen_cores, machine

    facts = machine(chosen_cores(None))
    isa = " ".join(flag for flag, there in facts["isa"].items() if there)
    print(f"{facts['cpu']}, {torch.get_num_threads()} threads, {isa}; {facts['versions']}")
    print(f"rank {args.rank}, {args.dtype}, ms a forward\n")
    classes = contenders()
    print(f"| batch | {' | '.join(classes)} | stock / patch |\n|---|{'---|' * (len(classes) + 1)}")
    for phase, tokens_each in (("prefill", PREFILL_TOKENS // REQUESTS), ("decode", 1)):
        for name, adapters in BATCHES.items():
            options = (adapters, tokens_each, args.rank, getattr(torch, args.dtype))
            ms = measure({c: forward_of(cls, *options) for c, cls in classes.items()}, args.rounds)
            cells = " | ".join(f"{value:.1f}" for value in ms.values())
            print(f"| {phase}, {name} | {cells} | {ms['stock'] / ms['patch']:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
