"""Widened products of 16-bit layers equal the exact ones to the rounding of the output. And who takes which product."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.engines import Engines, worker_of
from vllm_zo.worker.cpu import linear as cpu_linear
from vllm_zo.worker.cpu.linear import (
    PLAIN_ROWS,
    is_emulated,
    is_kept_plain,
    plain_for_many_rows,
    widened_linear,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 16, 33])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_widened_product_is_the_exact_one_rounded_once(
    dtype: torch.dtype, tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_linear, "BLOCK_ELEMENTS", 7 * 48)  # several blocks, the last one shorter
    torch.manual_seed(tokens)
    x, weight = torch.randn(tokens, 48).to(dtype), torch.randn(40, 48).to(dtype)
    offset = torch.randn(40).to(dtype) if bias else None
    exact = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    # Half a unit in the last place for the one rounding of the output, and float32 sums of 48 terms below it.
    unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(widened_linear(x, weight, offset).double(), exact, rtol=1.01 * unit, atol=2e-5)


def test_leading_dimensions_are_kept() -> None:
    x, weight = torch.randn(4, 8, 48).bfloat16(), torch.randn(40, 48).bfloat16()
    assert torch.equal(widened_linear(x, weight, None), widened_linear(x.view(32, 48), weight, None).view(4, 8, 40))


@pytest.mark.parametrize(
    ("capabilities", "dtype", "emulated"),
    [
        ({"avx512_f": True}, torch.bfloat16, True),
        ({"avx512_bf16": True}, torch.bfloat16, False),
        ({"avx512_bf16": True}, torch.float16, True),
        ({"bf16": True}, torch.bfloat16, False),
        ({}, torch.float32, False),
    ],
)
def test_only_types_without_instructions_are_widened(
    capabilities: dict[str, bool], dtype: torch.dtype, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert is_emulated.__wrapped__(dtype) is emulated  # the answer itself is cached


@pytest.fixture
def training_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": False})
    monkeypatch.setattr(cpu_linear, "_bytes_left", 0)
    cpu_linear.keep_plain_weights()


@pytest.mark.usefixtures("training_worker")
def test_small_float32_weights_are_kept_plain_where_the_cpu_has_no_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(dtype: torch.dtype = torch.float32) -> SimpleNamespace:
        return SimpleNamespace(weight=torch.zeros(64, 48, dtype=dtype))

    first, second, third = layer(), layer(), layer()
    monkeypatch.setattr(cpu_linear, "KEPT_BYTES", 2 * first.weight.nbytes)
    cpu_linear.keep_plain_weights()
    assert not is_kept_plain(layer(torch.bfloat16))
    for capabilities in ({"avx512_f": True}, {"neon": True}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cpu, "get_capabilities", lambda kinds=capabilities: kinds)
            assert not is_kept_plain(layer())
    assert is_kept_plain(first) and is_kept_plain(first) and is_kept_plain(second)
    assert not is_kept_plain(third) and is_kept_plain(first), "the rest is packed only; what was decided stays"


def test_few_rows_go_to_the_packed_product_and_many_to_the_plain_one() -> None:
    seen: list[int] = []

    def packed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(len(x))
        return x @ weight.T + bias

    linear, weight, bias = plain_for_many_rows(packed), torch.randn(40, 48), torch.randn(40)
    for rows in (1, PLAIN_ROWS - 1, PLAIN_ROWS, 1000):
        x = torch.randn(rows, 48)
        exact = x.double() @ weight.double().T + bias
        torch.testing.assert_close(linear(x, weight, bias).double(), exact, rtol=0, atol=2e-5)  # sums of 48 terms
    assert seen == [1, PLAIN_ROWS - 1]


def test_an_lm_head_uses_up_nothing_of_what_may_be_kept(engines: Engines) -> None:
    """It keeps its plain weight anyway, and is the largest weight of a small model."""
    model = worker_of(engines.get()).model_runner.get_model()
    assert hasattr(model.model.decoder.layers[0].fc1.base_layer, "zo_kept_plain")
    assert model.lm_head.weight.numel() and not hasattr(model.lm_head, "zo_kept_plain")
