"""Both products with a plain float32 weight are the exact one, and the choice between them is the faster one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vllm_zo.worker.cpu import plain_linear as module
from vllm_zo.worker.cpu.plain_linear import MIN_TOKENS, fastest, onednn_linear, plain_linear

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("tokens", [1, MIN_TOKENS - 1, MIN_TOKENS, 97])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_product_of_onednn_is_the_exact_one(tokens: int, bias: bool) -> None:
    torch.manual_seed(tokens)
    wide = torch.randn(tokens, 2 * 48)
    x, weight = wide[:, :48], torch.randn(40, 48)  # rows that do not lie next to each other
    offset = torch.randn(40) if bias else None
    exact = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    # float32 sums of 48 terms of size 1: each rounds to some 1e-7 of at most 20.
    torch.testing.assert_close(onednn_linear(x, weight, offset).double(), exact, rtol=0, atol=2e-5)


@needs_onednn
def test_the_product_of_onednn_reads_the_weight_as_it_is_now() -> None:
    """It must keep no packed copy: a fold writes into the weight between two products."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 48), torch.randn(40, 48)
    before = onednn_linear(x, weight, None)
    weight.mul_(2)
    torch.testing.assert_close(onednn_linear(x, weight, None), 2 * before)


@needs_onednn
def test_leading_dimensions_are_kept() -> None:
    x, weight = torch.randn(4, 8, 48), torch.randn(40, 48)
    assert torch.equal(onednn_linear(x, weight, None), onednn_linear(x.view(32, 48), weight, None).view(4, 8, 40))


@pytest.mark.parametrize(
    ("mkl", "onednn", "chosen"), [(2.0, 1.0, onednn_linear), (1.0, 1.0, F.linear), (1.0, 1.3, F.linear)]
)
def test_onednn_is_taken_where_it_is_much_faster(mkl: float, onednn: float, chosen: object) -> None:
    assert fastest(mkl, onednn) is chosen


def test_a_torch_without_onednn_multiplies_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert plain_linear.__wrapped__() is F.linear  # the answer itself is cached


@needs_onednn
def test_the_products_of_this_machine_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    monkeypatch.setattr(module, "_seconds", lambda linear: timed.append(linear) or float(len(timed)))
    assert plain_linear.__wrapped__() is F.linear
    assert timed == [F.linear, onednn_linear]
