"""The grouped-GEMM LoRA of the CPU backend against a plain fp64 reference and against vLLM's own per-token path."""

from __future__ import annotations

import pytest
import torch
import vllm
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from benchmarks.cpu_lora import patched_wrapper
from vllm_zo.worker.cpu import native
from vllm_zo.worker.cpu.lora import GroupedPunicaWrapper

SLOTS, RANK, IN, OUTS = 4, 8, 48, (32, 16, 16)
IDS = [11, 12, 13, 14]
BATCHES = {
    "one adapter": [(11, 9)],
    "plain only": [(0, 7)],
    "plus and minus": [(11, 5), (12, 6)],
    "adapters, plain requests and repeats": [(0, 3), (12, 1), (11, 4), (0, 1), (11, 2), (14, 7), (13, 1)],
    "single tokens": [(11, 1), (12, 1), (0, 1), (13, 1)],
}


class SharedPair:
    """Slots 0 and 1 hold the same A in their first `used` rows, as a +/- pair does."""

    def __init__(self, used: int) -> None:
        self.used = used

    def shares_a(self, slot: int, other: int) -> bool:
        return {slot, other} <= {0, 1}

    def used_rank(self, slot: int) -> int:
        return self.used if slot < 2 else RANK


def factors(dtype: torch.dtype, used: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    a = tuple(torch.randn(SLOTS, 1, RANK, IN).to(dtype) for _ in OUTS)
    b = tuple(torch.randn(SLOTS, 1, out, RANK).to(dtype) for out in OUTS)
    for part in a:
        part[1] = part[0]
        part[:2, :, used:] = 0
    for part in b:
        part[:2, ..., used:] = 0
    return a, b


PATCHED_RELEASES = ("0.32.0", "0.33.0")
"""What patches/0005 is against; elsewhere only ours is compared."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("pooled", [False, True], ids=["no pool", "shared shrink"])
@pytest.mark.parametrize("kernel", [True, False], ids=["our kernel", "torch"])
def test_grouped_lora_equals_the_dense_product_and_the_stock_path(
    dtype: torch.dtype, name: str, pooled: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(native, "library", lambda: None)
    torch.manual_seed(sum(map(ord, name)))
    batch = BATCHES[name]
    tokens = [lora_id for lora_id, count in batch for _ in range(count)]
    mapping = LoRAMapping(tuple(tokens), tuple(i for i, _ in batch), is_prefill=True)
    grouped, stock = GroupedPunicaWrapper(64, 16, "cpu"), PunicaWrapperCPU(64, 16, "cpu")
    grouped.pool = SharedPair(used=5) if pooled else None
    compared = [grouped, patched_wrapper()(64, 16, "cpu")] if vllm.__version__ in PATCHED_RELEASES else [grouped]
    for wrapper in (stock, *compared):
        wrapper.update_metadata(mapping, list(IDS), SLOTS + 1, 100)
    a, b = factors(dtype, used=5)
    x = torch.randn(len(tokens), IN).to(dtype)
    base = torch.randn(len(tokens), sum(OUTS)).to(dtype)

    expected = base.double()
    for t, lora_id in enumerate(tokens):
        if lora_id:
            slot = IDS.index(lora_id)
            delta = [
                x[t].double() @ a_i[slot, 0].double().T @ b_i[slot, 0].double().T for a_i, b_i in zip(a, b, strict=True)
            ]
            expected[t] += 0.5 * torch.cat(delta)
    theirs = base.clone()
    stock.add_lora_linear(theirs, x, a, b, 0.5, OUTS)
    # All round the shrunk row and the sum to `dtype`; entries are ~30, so a few ulp of that.
    tolerance = 60 * torch.finfo(dtype).eps
    for wrapper in compared:
        ours = base.clone()
        wrapper.add_lora_linear(ours, x, a, b, 0.5, OUTS)
        error = (ours.double() - expected).abs().max()
        assert error < tolerance * 4
        assert error <= (theirs.double() - expected).abs().max() + tolerance * 2


@pytest.mark.parametrize("patched", [False, True], ids=["vllm_zo", "patches/0005"])
def test_embeddings_and_logits_use_their_own_adapter_or_none(patched: bool) -> None:
    """Stock vLLM gives a row without an adapter the last slot's, which is a probe of ours."""
    if patched and vllm.__version__ not in PATCHED_RELEASES:
        pytest.skip(f"patches/0005 is against {' and '.join(PATCHED_RELEASES)}")
    torch.manual_seed(0)
    tokens = (0, 14, 11, 11, 0, 12, 11)
    wrapper = (patched_wrapper() if patched else GroupedPunicaWrapper)(64, 16, "cpu")
    wrapper.update_metadata(LoRAMapping(tokens, tokens, is_prefill=False), list(IDS), SLOTS + 1, 100)
    a, b = torch.randn(SLOTS, 1, RANK, IN), torch.randn(SLOTS, 1, 100, RANK)
    x, shrunk = torch.randn(len(tokens), IN), torch.randn(len(tokens), RANK)
    logits, embedded = torch.randn(len(tokens), 104), torch.randn(len(tokens), 100)  # the vocabulary may be padded
    expected_logits, expected_embedded = logits.double(), embedded.double()
    for t, lora_id in enumerate(tokens):
        if lora_id:
            b_t = b[IDS.index(lora_id), 0].double()
            expected_logits[t, :100] += 0.5 * x[t].double() @ a[IDS.index(lora_id), 0].double().T @ b_t.T
            expected_embedded[t] += shrunk[t].double() @ b_t.T
    wrapper.add_lora_logits(logits, x, a, b, 0.5)
    wrapper.add_lora_embedding(embedded, shrunk, b, add_input=True)
    tolerance = 60 * torch.finfo(torch.float32).eps * 4
    torch.testing.assert_close(logits.double(), expected_logits, rtol=0, atol=tolerance)
    torch.testing.assert_close(embedded.double(), expected_embedded, rtol=0, atol=tolerance)


def test_add_inputs_false_overwrites() -> None:
    wrapper = GroupedPunicaWrapper(64, 16, "cpu")
    wrapper.update_metadata(LoRAMapping((11, 0), (11, 0), is_prefill=True), list(IDS), SLOTS + 1, 100)
    a, b = factors(torch.float32, used=RANK)
    y = torch.full((2, sum(OUTS)), 7.0)
    wrapper.add_lora_linear(y, torch.randn(2, IN), a, b, 1.0, OUTS, add_inputs=False)
    assert (y[1] == 0).all() and (y[0] != 7).all()


def test_one_shrink_serves_both_signs() -> None:
    wrapper = GroupedPunicaWrapper(64, 16, "cpu")
    wrapper.pool = SharedPair(used=5)
    tokens = (11,) * 3 + (12,) * 4 + (13,) * 2
    wrapper.update_metadata(LoRAMapping(tokens, (11, 12, 13), is_prefill=True), list(IDS), SLOTS + 1, 100)
    assert [(s.start, s.stop, s.rank, len(s.runs)) for s in wrapper.spans] == [(0, 7, 5, 2), (7, 9, RANK, 1)]
