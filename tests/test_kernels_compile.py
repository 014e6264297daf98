"""Every Triton kernel of ours compiles to machine code of a GPU, which needs none: Triton brings NVIDIA's assembler.

The interpreter, in which the other tests run the kernels, is laxer than the compiler about types, shapes and registers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_zo
from tests.children import in_interpreter

PACKAGE = Path(vllm_zo.__file__).parent
HALVES = (torch.float16, torch.bfloat16)


def compile_all(capability: int, file: str) -> None:
    """Launch everything with Triton's launch replaced by its compiler. Writes what each kernel takes to `file`."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoDevice:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(NoDevice())
    run, found = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append({"name": self.fn.__name__, "code": len(kernel.asm["cubin"]), "shared": kernel.metadata.shared})
        return kernel

    JITFunction.run = compile_only
    launch_noise()
    launch_slots_and_scores()
    launch_products()
    launch_folds()
    Path(file).write_text(json.dumps(found))


def launch_noise() -> None:
    from vllm_zo.noise import ElementRanges
    from vllm_zo.noise import triton as noise

    ranges, cpu = ElementRanges.of([("m", 0, 100), ("n", 5, 9)]), torch.device("cpu")
    for dtype in (torch.float32, torch.int32):
        noise.fill(2**63, ranges, cpu, dtype)
    noise.add(torch.zeros(ranges.total), [1, 2], torch.ones(2), 0.5, ranges)


def launch_slots_and_scores() -> None:
    from vllm_zo.worker.cuda import triton_scores
    from vllm_zo.worker.cuda.triton_slots import OneLaunchWriter
    from vllm_zo.worker.slot_writers import Piece

    for dtype in HALVES:
        OneLaunchWriter([Piece(torch.zeros(3, 64, 16, dtype=dtype), 0)], 2).write(torch.zeros(128), 1, 2, 0.5)
        hidden, weight = torch.zeros(5, 64, dtype=dtype), torch.zeros(304, 64, dtype=dtype)
        rows, labels = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
        for bias, soft_cap in ((None, None), (torch.zeros(304, dtype=dtype), 5.0)):
            options: dict[str, Any] = {"soft_cap": soft_cap, "scale": 1.0}
            entries = torch.zeros(5, 3, dtype=torch.int64)
            triton_scores.label_logits(hidden, weight, bias, entries, torch.zeros(2, 9), **options)
            triton_scores.log_prob_parts(hidden, weight, bias, rows, labels, **options)


def launch_products() -> None:
    """Slots of the rank of LoZO and of the widest rank."""
    from vllm_zo.worker.cuda.lora_tiles import DeviceTiles
    from vllm_zo.worker.cuda.triton_lora import lora_linear

    for dtype in HALVES:
        for rank in (16, 128):
            a = [torch.zeros(3, 1, rank, 768, dtype=dtype) for _ in range(3)]
            b = [torch.zeros(3, 1, 768, rank, dtype=dtype) for _ in range(3)]
            x, y = torch.zeros(64, 768, dtype=dtype), torch.zeros(64, 3 * 768, dtype=dtype)
            tiles = DeviceTiles(64, 3, "cpu")
            lora_linear(y, x, a, b, tiles.rows, tiles.shrink, tiles.expand, torch.tensor([False]), 1.0, True)


def launch_folds() -> None:
    from vllm_zo.worker.cuda.triton_fold import fold_into

    for dtype in (*HALVES, torch.float32):
        weight = torch.zeros(64, 512, dtype=dtype)
        u, v = torch.zeros(64, 2), torch.zeros(512, 2)
        fold_into(weight, u, v, 2**63, "m", out=weight)
        fold_into(weight, u, v, 2**63, "m", first_element=3, stride=1031)
        fold_into(weight, torch.zeros(64, 512), None, 2**63, "m")


IN_A_CHILD = """
import sys
from tests.test_kernels_compile import compile_all
compile_all(int(sys.argv[1]), sys.argv[2])
"""


def launched() -> set[str]:
    """Names of the kernels that this package launches."""
    return {name for file in PACKAGE.rglob("*.py") for name in re.findall(r"\b(_\w+)\[\(", file.read_text())}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "shared"),
    [
        pytest.param(80, 166_912, id="ampere"),
        pytest.param(90, 232_448, id="hopper"),
        pytest.param(100, 232_448, id="blackwell"),
    ],
)
def test_kernels_compile(capability: int, shared: int, tmp_path: Path) -> None:
    """shared: bytes of shared memory that a program may have there."""
    file = tmp_path / "kernels.json"
    in_interpreter(IN_A_CHILD, str(capability), str(file), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    kernels = json.loads(file.read_text())
    assert {kernel["name"] for kernel in kernels} == launched()
    assert all(kernel["code"] > 0 and kernel["shared"] <= shared for kernel in kernels)
