"""Widened products of 16-bit layers equal the exact ones to the rounding of the output."""

from __future__ import annotations

import pytest
import torch

from vllm_zo.worker.cpu import linear as cpu_linear
from vllm_zo.worker.cpu.linear import has_avx512, is_emulated, widened_linear


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


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [({"avx2": True, "avx512_f": False}, False), ({"avx512_f": True}, True), ({"neon": True}, True)],
)
def test_only_an_x86_cpu_lacks_avx512(
    capabilities: dict[str, bool], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_avx512() is has
