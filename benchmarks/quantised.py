"""Training on a quantised base: accuracy before and after, and the time of a step, beside the same base unquantised.

    python benchmarks/quantised.py                             # the demo model, 400 steps each
    python benchmarks/quantised.py --model DIR --formats gptq  # another one with plain weights

The formats are those that vLLM reads and its CPU kernels multiply: GPTQ and AWQ (4-bit weights) and compressed-tensors
int8, which rounds activations too, a scale a token. Here weights are rounded to the nearest value; real checkpoints
are made with more care (llm-compressor, GPTQModel), and lose less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts

DEMO = Path(__file__).parents[1] / "examples" / "demo"
GROUP = 32
"""Inputs that share a scale; vLLM's kernels on a CPU take multiples of 32 inputs and outputs."""
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight outputs the n-th four bits of an int32 hold."""
LINEAR = re.compile(r"model\..*layers\.\d+\.(\w+\.)?(\w+_proj|fc1|fc2)\.weight")
DTYPES = {"gptq": "float16", "awq": "float16", "int8": "float32"}
"""What vLLM computes in: its 4-bit kernels take 16 bits only."""

Quantised = tuple[dict[str, Tensor], Tensor]
"""Tensors of a layer by the end of their names, and the (O, I) weight that they stand for."""


def pack(values: Tensor) -> Tensor:
    """(..., 8 n) values of 4 bits as (..., n) int32; the first is the lowest."""
    packed = (values.to(torch.int64).unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def in_groups(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(O, I) values 0 to 15 with zero point 8, (O, I / GROUP) float16 scales, and the weight that they stand for."""
    groups = weight_OI.unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 7).half()
    values = (groups / scales[..., None].float()).round().clamp(-8, 7)
    return (values + 8).flatten(1), scales, (values * scales[..., None].float()).flatten(1)


def gptq(weight_OI: Tensor) -> Quantised:
    values, scales, meant = in_groups(weight_OI)
    zeros = torch.full((scales.shape[1], scales.shape[0]), 7)  # the format holds the zero point minus one
    return {
        "qweight": pack(values).T,
        "qzeros": pack(zeros),
        "scales": scales.T,
        "g_idx": torch.arange(weight_OI.shape[1], dtype=torch.int32) // GROUP,
    }, meant


def awq(weight_OI: Tensor) -> Quantised:
    values, scales, meant = in_groups(weight_OI)
    interleaved = values.T.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1)
    zeros = torch.full((scales.shape[1], scales.shape[0]), 8)
    return {"qweight": pack(interleaved), "qzeros": pack(zeros), "scales": scales.T}, meant


def int8(weight_OI: Tensor) -> Quantised:
    scales = weight_OI.abs().amax(1, keepdim=True) / 127
    values = (weight_OI / scales).round()
    return {"weight": values.to(torch.int8), "weight_scale": scales}, values * scales


INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "int8": {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {**INT8, "strategy": "channel"},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }},
    },
}  # fmt: skip
"""`quantization_config` of a checkpoint."""
FORMATS: dict[str, Callable[[Tensor], Quantised]] = {"gptq": gptq, "awq": awq, "int8": int8}


def quantise(model: Path, name: str, root: Path) -> tuple[Path, Path]:
    """Write a checkpoint with quantised linear layers to `root`, and one with the plain weights that they stand for."""
    quantised, plain = root / name, root / f"{name}-plain"
    tensors = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    rest = {name: tensor for name, tensor in tensors.items() if not LINEAR.fullmatch(name)}
    packed, meant = dict(rest), dict(rest)
    for weight_name in tensors.keys() - rest.keys():
        parts, meant[weight_name] = FORMATS[name](tensors[weight_name].float())
        packed |= {weight_name.removesuffix("weight") + end: part.contiguous() for end, part in parts.items()}
    for directory, held in ((quantised, packed), (plain, meant)):
        shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(held, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[name]}))
    return quantised, plain


def train(model: Path, dtype: str, steps: int) -> dict[str, Any]:
    """The job of the demo; validation accuracy before and after, and the median time of a step."""
    from vllm_zo import LLM, Classification, LoZO

    llm = LLM(str(model), dtype=dtype, max_model_len=256, zo_training=True)
    run = llm.finetune(
        train=DEMO / "reviews" / "train.jsonl", validation=DEMO / "reviews" / "validation.jsonl",
        objective=Classification(template="{sentence} It was", options=[" terrible", " great"]),
        method=LoZO(rank=2, interval=50, eps=1e-3), batch_size=16, steps=steps, seed=0,
    )  # fmt: skip
    ends = [record["seconds"] for record in run.history]
    return {
        "before": run.evaluations[0]["eval_accuracy"],
        "after": run.metrics["accuracy"],
        "ms": 1e3 * statistics.median(b - a for a, b in itertools.pairwise(ends)),
        "megabytes": (model / "model.safetensors").stat().st_size / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["gptq", "int8"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    machine = facts.machine(facts.chosen_cores(None))
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as root:
        for name in args.formats:
            quantised, _ = quantise(args.model, name, Path(root))
            rows.setdefault(f"plain, {DTYPES[name]}", train(args.model, DTYPES[name], args.steps))
            rows[f"{name}, {DTYPES[name]}"] = train(quantised, DTYPES[name], args.steps)
    print(f"| {args.steps} steps, {machine['cpu']} | weights, MB | accuracy before | after | ms a step |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['megabytes']:.1f} | {row['before']:.3f} | {row['after']:.3f} | {row['ms']:.0f} |")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "machine": machine}, indent=1))


if __name__ == "__main__":
    main()
