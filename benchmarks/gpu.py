"""What the benchmarks need to know about a GPU: the card, the floor of a step there, and the options of vLLM.

Only child processes import torch: a parent that times others must not hold a context on the card.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.shapes import Shape, mean_prompt_tokens

GIB = 1 << 30
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KV_CACHE_BYTES = 4 * GIB
"""The KV cache of ours. A group of 128 examples of OPT-13B fills 2.9 GiB of it."""
MAX_BATCHED_TOKENS = 16384
"""16 directions of 16 examples make a group of some 7,100 tokens, at most 10,000."""
BESIDE_WEIGHTS_BYTES = 10 * GIB
"""An estimate of what a contender takes beyond 1.1 times its weights: KV cache or logits, graphs, the CUDA context."""
USABLE_SHARE = 0.9
"""The share of the card's memory that the contenders together may take."""

PROBE = """
import json, torch
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    print(json.dumps({"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}))
else:
    print("null")
"""

RATES = """
import json, sys, torch
dtype = getattr(torch, sys.argv[1])

def seconds(call, repeats=20):
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats

n = 8192
a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
source = torch.ones(1 << 30, device="cuda", dtype=torch.uint8)
target = torch.empty_like(source)
print(json.dumps({
    "flops_per_s": 2 * n**3 / seconds(lambda: a @ b),
    "bytes_per_s": 2 * source.numel() / seconds(lambda: target.copy_(source)),
}))
"""


def _ask(program: str, *arguments: str) -> Any:
    child = subprocess.run([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def find() -> dict[str, Any] | None:
    """The name, memory, CUDA version and driver of the card that torch sees; None if it sees none."""
    card: dict[str, Any] | None = _ask(PROBE)
    if card is None:
        return None
    return card | {"driver": _driver()}


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def rates(dtype: str) -> dict[str, float]:
    """Measured rates of the card: a square product of 8192 in `dtype`, and a copy of a GiB (read and written)."""
    measured: dict[str, float] = _ask(RATES, dtype)
    return measured


def linear_parameters(shape: Shape) -> int:
    """The number of weights in the trained linear modules of all layers."""
    return shape.layers * sum(outputs * inputs for outputs, inputs in shape.linears.values())


def parameters(shape: Shape) -> int:
    """The number of weights in all matrices: those of `linear_parameters` and the embeddings."""
    table_of_positions = 0 if shape.is_llama else shape.positions
    return linear_parameters(shape) + (shape.vocab + table_of_positions) * shape.hidden


def floor(shape: Shape, dtype: str, batch: int, measured: dict[str, float]) -> dict[str, Any]:
    """The least milliseconds of a step: the larger of its arithmetic and of reading its weights once."""
    tokens = 2 * batch * mean_prompt_tokens()
    arithmetic = 1e3 * 2 * linear_parameters(shape) * tokens / measured["flops_per_s"]
    traffic = 1e3 * ITEM_BYTES[dtype] * linear_parameters(shape) / measured["bytes_per_s"]
    return {"tokens": tokens, "arithmetic_ms": arithmetic, "traffic_ms": traffic, "ms": max(arithmetic, traffic)}


def fit_together(shape: Shape, dtype: str, contenders: int, memory_bytes: int) -> bool:
    """Whether this number of contenders can hold their models on the card at the same time."""
    one = 1.1 * ITEM_BYTES[dtype] * parameters(shape) + BESIDE_WEIGHTS_BYTES
    return contenders * one < USABLE_SHARE * memory_bytes


def engine_options(model_dir: str, groups: Iterable[int] = (), max_num_seqs: int = 256) -> dict[str, Any]:
    """The options of vLLM's LLM on a GPU.

    Args:
        model_dir: if the directory has no weights, the engine makes random ones on the device.
        groups: token counts of the groups to come. vLLM's own graphs end at 512 tokens, below most groups.
        max_num_seqs: how many members must be able to run at once.
    """
    from vllm_zo.entrypoints.llm.cuda_graphs import sizes_for  # imports torch

    options: dict[str, Any] = {
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "gpu_memory_utilization": 0.5,  # with a fixed KV cache vLLM only checks at its start that so much is free
        "max_num_seqs": max(256, max_num_seqs),
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "compilation_config": {"cudagraph_capture_sizes": sizes_for(groups, MAX_BATCHED_TOKENS)},
    }
    if not any(Path(model_dir).glob("*.safetensors")):
        options["load_format"] = "dummy"
    return options
