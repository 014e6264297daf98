"""vLLM's kernels for norms and rotary embeddings run where vLLM alone leaves them off, with the same numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import ir
from vllm.config import CompilationMode

from tests.engines import Engines, worker_of
from vllm_zo.worker.cpu.kernels import PROVIDER, choose_kernels

TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 1e-2, "rtol": 2e-2}}
"""float32 sums of a hundred terms; and where torch's operators round to 8 bits once more than the kernel."""


def config(custom_ops: list[str], norm: list[str], mode: Any = CompilationMode.NONE) -> Any:
    priorities = SimpleNamespace(rms_norm=norm, fused_add_rms_norm=["native"])
    return SimpleNamespace(
        compilation_config=SimpleNamespace(mode=mode, custom_ops=custom_ops),
        kernel_config=SimpleNamespace(ir_op_priority=priorities),
    )


def test_kernels_are_chosen_where_the_user_has_not_and_nothing_compiles() -> None:
    left_open = config(["none"], ["native"])
    choose_kernels(left_open)
    assert left_open.compilation_config.custom_ops == ["all"]
    assert left_open.kernel_config.ir_op_priority.rms_norm == [PROVIDER, "native"]
    assert left_open.kernel_config.ir_op_priority.fused_add_rms_norm == [PROVIDER, "native"]
    chosen = config(["none", "+silu_and_mul"], ["other", "native"])
    choose_kernels(chosen)
    assert chosen.compilation_config.custom_ops == ["none", "+silu_and_mul"]
    assert chosen.kernel_config.ir_op_priority.rms_norm == ["other", "native"]
    compiled = config(["none"], ["native"], CompilationMode.DYNAMO_TRACE_ONCE)
    choose_kernels(compiled)
    assert compiled.compilation_config.custom_ops == ["none"]
    assert compiled.kernel_config.ir_op_priority.rms_norm == ["native"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_norms_have_the_numbers_of_torchs_operators(rows: int, dtype: torch.dtype) -> None:
    choose_kernels(config(["none"], ["native"]))
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weight = draw(96)
    for x in (draw(rows, 96), draw(rows, 3, 96), draw(rows, 200)[:, :96]):
        expected = ir.ops.rms_norm.impls["native"].impl_fn(x, weight, 1e-5)
        with ir.ops.rms_norm.set_priority([PROVIDER, "native"]):
            torch.testing.assert_close(ir.ops.rms_norm(x, weight, 1e-5), expected, **TOLERANCE[dtype])
        residual = draw(*x.shape)
        normed, summed = ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, 1e-5)
        with ir.ops.fused_add_rms_norm.set_priority([PROVIDER, "native"]):
            ours = ir.ops.fused_add_rms_norm.maybe_inplace(x.clone(), residual, weight, 1e-5)
        torch.testing.assert_close(ours[0], normed, **TOLERANCE[dtype])
        torch.testing.assert_close(ours[1], summed, **TOLERANCE[dtype])


def test_what_a_kernel_cannot_do_is_left_to_torch() -> None:
    choose_kernels(config(["none"], ["native"]))
    fits = ir.ops.rms_norm.impls[PROVIDER].supports_args
    x, weight = torch.ones(2, 32), torch.ones(32)
    assert fits(x, weight, 1e-5)
    assert not fits(x, weight, 1e-5, 16)
    assert not fits(x, None, 1e-5)
    assert not fits(x.bfloat16(), weight, 1e-5)
    assert not fits(torch.ones(2, 40)[:, :32], weight, 1e-5)
    assert not fits(torch.ones(2, 24), torch.ones(24), 1e-5)


def test_an_engine_runs_them(engines: Engines) -> None:
    model = worker_of(engines.get("llama")).model_runner.get_model()
    assert model.model.layers[0].self_attn.rotary_emb._forward_method.__name__ == "forward_cpu"
    assert ir.ops.rms_norm.get_priority()[0] == ir.ops.fused_add_rms_norm.get_priority()[0] == PROVIDER
