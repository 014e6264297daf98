"""Our compiled kernels against float64, what they leave to torch, and how they are made.

`test_cpu_lora.py` and `test_whole_attention.py` compare them once more through their callers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import CompilationMode

from tests.engines import SENTIMENT, Engines, reviews, worker_of
from vllm_zo import LoZO
from vllm_zo.methods import fold
from vllm_zo.worker.cpu import fused_linear, native

needs_kernels = pytest.mark.skipif(native.library() is None, reason="the kernels could not be compiled")


def needs(kind: native.Kind) -> pytest.MarkDecorator:
    missing = native.library() is None or not kind.here()
    return pytest.mark.skipif(missing, reason=f"this CPU cannot run the product {kind.name}")


needs_tiles = needs(native.TILES)

ROUNDINGS = (native.stochastic_round, fold.stochastic_round)

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""A result is rounded once to the type, from a float32 one."""
IN_FLOAT32 = 4e-6
"""What sums of some hundred float32 terms of size 1 are off by."""


def assert_rounded_once(ours: Tensor, exact: Tensor, more: Tensor | float = 0.0) -> None:
    """Off by a sum in float32, `more`, and one rounding."""
    error = (ours.double() - exact).abs()
    assert (error <= HALF_ULP[ours.dtype] * exact.abs() * 1.01 + IN_FLOAT32 + more).all(), error.max()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.manual_seed(0)
    yield request.param


# --- gate -------------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("d", [1, 15, 16, 40, 96])
@pytest.mark.parametrize("gelu", [False, True], ids=["silu", "gelu"])
def test_a_gate_is_the_exact_one(d: int, gelu: bool, dtype: torch.dtype) -> None:
    x = (5 * torch.randn(3, 7, 2 * d)).to(dtype)
    exact = x.double()
    act = F.gelu(exact[..., :d], approximate="tanh") if gelu else F.silu(exact[..., :d])
    ours = native.gate(x, gelu=gelu)
    assert ours.shape == (3, 7, d)
    # The exponential is off by 2 units in the last place.
    error = (ours.double() - act * exact[..., d:]).abs()
    assert (error <= (HALF_ULP[dtype] + 2.0**-21) * (act * exact[..., d:]).abs() + 1e-6).all()


@needs_kernels
def test_a_gate_of_extremes(dtype: torch.dtype) -> None:
    x = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4, float("nan"), float("inf")] + [1.0] * 8], dtype=dtype)
    ours, torchs = native.gate(x, gelu=False), F.silu(x[:, :8])
    torch.testing.assert_close(ours, torchs, atol=1e-30, rtol=1e-2, equal_nan=True)


# --- low-rank products ------------------------------------------------------------------------------------------------

RANK, SLOTS = 6, 4


def factors(
    inputs: int, outputs: Sequence[int], dtype: torch.dtype, ranks: int = RANK
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    a = tuple((torch.randn(SLOTS, 1, ranks, inputs) / inputs**0.5).to(dtype) for _ in outputs)
    return a, tuple(torch.randn(SLOTS, 1, o, ranks).to(dtype) for o in outputs)


def exact_low_rank(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    runs: Sequence[Sequence[int]],
    scale: float,
    of: Callable[[Tensor], Tensor] = torch.clone,
) -> Tensor:
    """of: what to take of x A^T and of B before they are multiplied; `torch.abs` gives the size of the terms."""
    exact = y.double()
    for start, stop, slot, rank in runs:
        rank = a[0].shape[2] if rank < 0 else rank
        parts = [
            of(x[start:stop].double() @ a_i[slot, 0, :rank].double().T) @ of(b_i[slot, 0, :, :rank].double().T)
            for a_i, b_i in zip(a, b, strict=True)
        ]
        exact[start:stop] += scale * torch.cat(parts, 1)
    return exact


@needs_kernels
@pytest.mark.parametrize("outputs", [(32,), (48, 16, 16), (7,), (33, 5)], ids=str)
@pytest.mark.parametrize("inputs", [24, 144, 5])
@pytest.mark.parametrize(
    "runs",
    [
        [(0, 9, 0, 2), (9, 20, 1, 2)],
        [(2, 3, 3, RANK), (5, 6, 0, 1), (6, 7, 2, -1)],  # rows without an adapter between them
        [(0, 20, 1, 0)],
        [],
    ],
    ids=["pair", "requests", "rank 0", "nobody"],
)
def test_a_low_rank_product_is_the_exact_one(
    outputs: tuple[int, ...], inputs: int, runs: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    a, b = factors(inputs, outputs, dtype)
    # Rows that do not lie next to each other.
    x, y = torch.randn(20, inputs + 3).to(dtype)[:, :inputs], torch.randn(20, sum(outputs) + 1).to(dtype)[:, 1:]
    found = native.factors(a, b)
    assert found is not None
    exact = exact_low_rank(y, x, a, b, runs, 0.5)
    native.low_rank(y, x, found, torch.tensor(runs, dtype=torch.int64).view(-1, 4), 0.5)
    assert_rounded_once(y, exact)


@needs_kernels
def test_many_runs_take_the_scratch_in_turns(dtype: torch.dtype) -> None:
    """As many adapters as do not fit into it at once, with rows enough for all threads."""
    inputs, outputs, rows = 4096, (8192,), 90
    a, b = factors(inputs, outputs, dtype)
    runs = [(3 * i, 3 * i + 3, i % SLOTS, RANK) for i in range(rows // 3)]
    assert len(runs) * RANK * (inputs + outputs[0]) > 2**21  # MAX_SCRATCH of native.cpp
    x, y = torch.randn(rows, inputs).to(dtype), torch.randn(rows, *outputs).to(dtype)
    exact = exact_low_rank(y, x, a, b, runs, 1.0)
    found = native.factors(a, b)
    assert found is not None
    native.low_rank(y, x, found, torch.tensor(runs), 1.0)
    assert_rounded_once(y, exact)


@needs_kernels
def test_a_rows_bits_do_not_depend_on_other_rows_or_threads(dtype: torch.dtype) -> None:
    a, b = factors(144, (96, 33), dtype)
    x, y = torch.randn(300, 144).to(dtype), torch.randn(300, 129).to(dtype)
    found = native.factors(a, b)
    assert found is not None

    def product(rows: slice) -> Tensor:
        part = y[rows].clone()
        native.low_rank(part, x[rows], found, torch.tensor([(0, len(part), 1, 3)]), 1.0)
        return part

    whole = product(slice(None))
    for start in (0, 7, 299):
        assert torch.equal(product(slice(start, start + 1)), whole[start : start + 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(product(slice(None)), whole)
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_factors_of_another_layer_are_refused() -> None:
    found = native.factors(*factors(24, (8, 8), torch.float32))
    assert found is not None
    runs = torch.tensor([(0, 4, 0, 2)])
    for y, x in (((4, 16), (4, 23)), ((4, 15), (4, 24))):
        with pytest.raises(ValueError, match="the factors are for 24 to"):
            native.low_rank(torch.zeros(y), torch.zeros(x), found, runs, 1.0)
    with pytest.raises(ValueError, match="4 rows cannot be added to 3"):
        native.low_rank(torch.zeros(3, 16), torch.zeros(4, 24), found, runs, 1.0)


def test_factors_that_the_kernel_cannot_take() -> None:
    a, b = factors(24, (8, 8), torch.float32)
    assert native.factors(a, [part.half() for part in b]) is None
    assert native.factors([part.half() for part in a], [part.half() for part in b]) is None
    assert native.factors(a, [part.transpose(2, 3).contiguous().transpose(2, 3) for part in b]) is None
    assert native.factors(a * 3, b * 3) is None  # six slices
    assert native.factors([a[0], a[1][:, :, :2].contiguous()], b) is None  # of unlike ranks


# --- attention --------------------------------------------------------------------------------------------------------


def exact_attention(q: Tensor, k: Tensor, v: Tensor, heads: native.Heads) -> Tensor:
    """(L, heads * D) of one sequence in float64."""
    n = len(q)
    q, k, v = (x.double().view(n, -1, heads.width).transpose(0, 1) for x in (q, k, v))
    group = heads.heads // heads.kv_heads
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    sees = torch.ones(n, n, dtype=torch.bool).tril()
    if heads.window > 0:
        sees &= sees.triu(1 - heads.window)
    weights = (heads.scale * q @ k.transpose(1, 2)).masked_fill(~sees, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).reshape(n, -1)


@needs_kernels
@pytest.mark.parametrize("width", [64, 20, 3])
@pytest.mark.parametrize(("kv_heads", "window"), [(6, -1), (2, -1), (1, 4), (3, 1), (2, 19)])
def test_attention_is_the_exact_one(width: int, kv_heads: int, window: int, dtype: torch.dtype) -> None:
    heads = native.Heads(6, kv_heads, width, window, width**-0.5)
    lengths = [70, 33, 17, 16, 8, 1]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    places = int(starts[-1])
    rows = torch.randperm(places)
    packed = torch.randn(places, (6 + 2 * kv_heads) * width).to(dtype)
    qkv = packed.split([6 * width, kv_heads * width, kv_heads * width], 1)  # views, as a packed layer makes them
    ours = native.attend(*qkv, starts, rows, torch.ones(places, dtype=torch.uint8), heads)
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        at = rows[start:stop]
        assert_rounded_once(ours[at], exact_attention(*(x[at] for x in qkv), heads))


@needs_kernels
def test_a_sequence_attends_alike_whatever_is_beside_it_and_shared_rows_are_written_once(dtype: torch.dtype) -> None:
    heads = native.Heads(2, 1, 16, -1, 0.25)
    q, k, v = torch.randn(30, 32).to(dtype), torch.randn(30, 16).to(dtype), torch.randn(30, 16).to(dtype)
    first, second = [*range(20)], [*range(12), *range(20, 30)]  # they share 12 rows
    writes = torch.tensor([1] * 20 + [0] * 12 + [1] * 10, dtype=torch.uint8)
    both = native.attend(q, k, v, torch.tensor([0, 20, 42]), torch.tensor(first + second), writes, heads)
    for rows in (first, second):
        at, ones = torch.tensor(rows), torch.ones(len(rows), dtype=torch.uint8)
        alone = native.attend(q, k, v, torch.tensor([0, len(rows)]), at, ones, heads)
        assert torch.equal(both[at], alone[at])


# --- stochastic rounding ----------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize(("first", "stride"), [(0, None), (7, None), (3, 1001), (2**33 + 1, 75)])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_rounding_has_the_bits_of_torchs(first: int, stride: int | None, to: torch.dtype) -> None:
    torch.manual_seed(0)
    value = torch.randn(33, 75) * torch.logspace(-8, 8, 75)
    value[0, :6] = torch.tensor([float("inf"), -float("inf"), 3.3895e38, -3.4e38, -0.0, 1e-42])
    ours, torchs = (round(value, to, 2**63 + 5, "a.module", first, stride) for round in ROUNDINGS)
    assert torch.equal(ours.view(torch.int16), torchs.view(torch.int16))
    assert native.stochastic_round(torch.full((2, 4), torch.nan), to, 1, "m").isnan().all()


# --- products of layers -----------------------------------------------------------------------------------------------


@pytest.fixture(params=[pytest.param(kind, marks=needs(kind), id=kind.name) for kind in native.KINDS])
def multiplied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The type of a product of ours, which multiplies in this test whatever is faster here."""
    kind: native.Kind = request.param
    monkeypatch.setattr(native, "kind_of", lambda dtype: kind if dtype == kind.dtype else None)
    torch.manual_seed(0)
    return kind.dtype


@pytest.mark.parametrize("rows", [0, 1, 6, 16, 17, 32, 45, 300])
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 32), (7, 5), (96, 576), (65, 33), (50, 2305)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_a_product_is_the_exact_one(
    rows: int, outputs: int, inputs: int, with_bias: bool, multiplied: torch.dtype
) -> None:
    x = torch.randn(2, rows, inputs + 3).to(multiplied)[1, :, :inputs]  # rows that do not lie next to each other
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(multiplied)
    bias = torch.randn(outputs).to(multiplied) if with_bias else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    ours = fused_linear.FusedLinear(weight)(x, None, bias)
    assert ours.shape == (rows, outputs) and ours.dtype == multiplied
    if rows:
        assert_rounded_once(ours, exact)


@pytest.mark.parametrize(("outputs", "inputs"), [(32, 32), (7, 5), (17, 33), (96, 576), (65, 31)], ids=str)
def test_a_packed_weight_is_read_back(outputs: int, inputs: int, multiplied: torch.dtype) -> None:
    weight = torch.randn(outputs, inputs).to(multiplied)
    weight.view(-1)[:2] = torch.tensor([torch.nan, -0.0])
    read = fused_linear.FusedLinear(weight).weight()
    assert torch.equal(read.view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize("outputs", [(32,), (96, 32, 64)], ids=str)
@pytest.mark.parametrize(("inputs", "ranks"), [(64, 6), (150, 16), (150, 40)], ids=str)
@pytest.mark.parametrize(
    "runs",
    [
        [(0, 40, 0, 2), (40, 80, 1, 2)],
        [(2, 3, 3, -1), (33, 60, 0, 1), (60, 61, 2, 5)],  # rows without an adapter between them
        [(0, 80, 1, 0)],
        [(row, row + 1, row % SLOTS, -1) for row in range(80)],
        [],
    ],
    ids=["pair", "requests", "rank 0", "a run a row", "nobody"],
)
def test_a_product_with_a_low_rank_part_is_the_exact_one(
    outputs: tuple[int, ...], inputs: int, ranks: int, runs: list[tuple[int, ...]], multiplied: torch.dtype
) -> None:
    """In tiles a shrunk number goes on as two of bfloat16. Each is off by 2^-9, the second of what the first leaves."""
    a, b = factors(inputs, outputs, multiplied, ranks)
    found = native.factors(a, b)
    assert found is not None
    x, bias = torch.randn(80, inputs + 1).to(multiplied)[:, 1:], torch.randn(sum(outputs)).to(multiplied)
    weight = (torch.randn(sum(outputs), inputs) / inputs**0.5).to(multiplied)
    linear = fused_linear.FusedLinear(weight)
    exact = exact_low_rank(x.double() @ weight.double().T + bias.double(), x, a, b, runs, 1.0)
    ours = linear.with_low_rank(x, bias, found, torch.tensor(runs, dtype=torch.int64).view(-1, 4))
    terms = exact_low_rank(torch.zeros_like(exact), x, a, b, runs, 1.0, torch.abs)
    assert_rounded_once(ours, exact, 2.0**-18 * terms)


@pytest.mark.parametrize(("outputs", "more"), [((7, 33, 90, 5), 0), ((40, 24), 100)], ids=str)
def test_slices_end_anywhere_in_a_panel(outputs: tuple[int, ...], more: int, multiplied: torch.dtype) -> None:
    a, b = factors(50, outputs, multiplied)
    found = native.factors(a, b)
    assert found is not None
    x, weight = torch.randn(21, 50).to(multiplied), (torch.randn(sum(outputs) + more, 50) / 7).to(multiplied)
    runs = [(0, 10, 1, RANK), (10, 15, 0, 3), (16, 21, 2, -1)]
    exact = x.double() @ weight.double().T
    exact[:, : sum(outputs)] = exact_low_rank(exact[:, : sum(outputs)], x, a, b, runs, 1.0)
    assert_rounded_once(fused_linear.FusedLinear(weight).with_low_rank(x, None, found, torch.tensor(runs)), exact)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("factor", ["a", "b"])
def test_an_adapter_that_is_not_finite_reaches_its_own_rows_only(
    bad: float, factor: str, multiplied: torch.dtype
) -> None:
    a, b = factors(64, (64, 32), multiplied)
    x, linear = torch.randn(40, 64).to(multiplied), fused_linear.FusedLinear(torch.randn(96, 64).to(multiplied))
    runs = torch.tensor([(0, 9, 0, RANK), (9, 12, 1, RANK), (15, 40, 2, RANK)])
    found = native.factors(a, b)
    assert found is not None
    finite = linear.with_low_rank(x, None, found, runs)
    (a if factor == "a" else b)[0][1, 0, RANK - 1, RANK - 1] = bad
    ours = linear.with_low_rank(x, None, found, runs)
    assert not ours[9:12].isfinite().all()
    others = [*range(9), *range(12, 40)]
    assert torch.equal(ours[others], finite[others])


@needs_tiles
@pytest.mark.parametrize(
    ("outputs", "more", "count"),
    [((40, 24), 0, 2), ((2048, 2048), 0, 60), ((32, 32), 40, 2)],
    ids=["odd slices", "many factors", "outputs without a slice"],
)
def test_a_low_rank_part_that_a_tile_product_cannot_take_comes_after_it(
    outputs: tuple[int, ...], more: int, count: int
) -> None:
    torch.manual_seed(0)
    a, b = factors(2048, outputs, torch.bfloat16)
    found = native.factors(a, b)
    assert found is not None
    weight = torch.randn(sum(outputs) + more, 2048).bfloat16()
    x, linear = torch.randn(120, 2048).bfloat16(), fused_linear.FusedLinear(weight)
    runs = torch.tensor([(120 // count * i, 120 // count * (i + 1), i % SLOTS, RANK) for i in range(count)])
    expected = linear(x, None, None)
    native.low_rank(expected, x, found, runs, 1.0)
    assert torch.equal(linear.with_low_rank(x, None, found, runs), expected)


def test_rows_that_do_not_fit_into_a_cache_take_turns(multiplied: torch.dtype) -> None:
    x, weight = torch.randn(700, 3072).to(multiplied), (torch.randn(96, 3072) / 55).to(multiplied)
    assert_rounded_once(fused_linear.FusedLinear(weight)(x, None, None), x.double() @ weight.double().T)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_a_rows_bits_in_a_product_depend_on_nothing_else(threads: int, multiplied: torch.dtype) -> None:
    x, linear = torch.randn(600, 200).to(multiplied), fused_linear.FusedLinear(torch.randn(160, 200).to(multiplied))
    a, b = factors(200, (96, 64), multiplied)
    found = native.factors(a, b)
    assert found is not None
    owners = [(0, 33, 0), (33, 300, 1), (310, 311, 2), (311, 600, 0)]

    def product(start: int, stop: int) -> Tensor:
        inside = [(max(i, start) - start, min(j, stop) - start, slot, RANK) for i, j, slot in owners]
        runs = torch.tensor([run for run in inside if run[0] < run[1]])
        return torch.cat([linear(x[start:stop], None, None), linear.with_low_rank(x[start:stop], None, found, runs)], 1)

    whole, before = product(0, 600), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for start, stop in ((0, 1), (7, 40), (100, 600), (0, 600)):
            assert torch.equal(product(start, stop), whole[start:stop])
    finally:
        torch.set_num_threads(before)


@needs_tiles
def test_onednn_multiplies_as_before_beside_a_tile_product() -> None:
    """oneDNN keeps what it has told the tiles between calls."""
    torch.manual_seed(0)
    x, weight, linear = torch.randn(64, 96).bfloat16(), torch.randn(48, 96).bfloat16(), torch.randn(32, 64).bfloat16()
    before = F.linear(x, weight)
    fused_linear.FusedLinear(linear)(x[:, :64], None, None)
    assert torch.equal(F.linear(x, weight), before)


def test_a_layer_gets_rows_of_its_own_type(multiplied: torch.dtype) -> None:
    linear, other = fused_linear.FusedLinear(torch.ones(4, 8).to(multiplied)), torch.float16
    with pytest.raises(ValueError, match=f"a layer in {multiplied} got {other}"):
        linear(torch.ones(3, 8).to(other), None, None)
    with pytest.raises(ValueError, match=f"{multiplied} and {other}"):
        linear(torch.ones(3, 8).to(multiplied), None, torch.ones(4).to(other))
    columns = torch.arange(24).to(multiplied).view(8, 3)
    assert torch.equal(linear(columns.T, None, None), linear(columns.T.contiguous(), None, None))


def test_who_gets_a_product_of_ours(multiplied: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(4, 8).to(multiplied)
    assert fused_linear.fits(weight) and not fused_linear.fits(weight.half())

    def loading(mode: CompilationMode) -> None:
        config = SimpleNamespace(compilation_config=SimpleNamespace(mode=mode))
        monkeypatch.setattr(fused_linear, "get_current_vllm_config_or_none", lambda: config)

    loading(CompilationMode.NONE)
    assert fused_linear.fits(weight)
    loading(CompilationMode.VLLM_COMPILE)
    assert not fused_linear.fits(weight)


@pytest.mark.parametrize(
    ("capability", "instructions", "kinds"),
    [
        ("AVX512", {"avx512_bf16": True, "amx_bf16": True}, {"tile", "panel"}),
        ("AVX512", {"avx512_bf16": True, "amx_bf16": False}, {"pair", "panel"}),
        ("AVX512", {}, {"panel"}),
        ("AVX2", {"avx512_bf16": True, "amx_bf16": True}, set()),
        ("DEFAULT", {}, set()),
    ],
)
def test_a_cpu_gets_the_products_that_it_can_run(
    capability: str, instructions: dict[str, bool], kinds: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    monkeypatch.setattr(native, "library", object)
    monkeypatch.setattr(native, "kind_of", native.kind_of.__wrapped__)  # the answer itself is cached
    found = {dtype: native.kind_of(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert {kind.name for kind in found.values() if kind is not None} == kinds
    for dtype, kind in found.items():
        assert fused_linear.fits(torch.ones(4, 8).to(dtype)) is (kind is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_multiplies_with_them(dtype: str, engines: Engines) -> None:
    if native.kind_of(getattr(torch, dtype)) is None:
        pytest.skip(f"this CPU has no product of ours in {dtype}")
    layers = worker_of(engines.get(dtype=dtype)).model_runner.get_model().model.decoder.layers
    for layer in (layers[0].fc1.base_layer, layers[1].self_attn.qkv_proj.base_layer):
        assert isinstance(layer.cpu_linear, fused_linear.FusedLinear) and not layer.weight.numel()


# --- how they are made ------------------------------------------------------------------------------------------------


@needs_kernels
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not the environment: vLLM reads it once, when an engine starts.
    monkeypatch.setattr(native, "envs", SimpleNamespace(VLLM_CACHE_ROOT=str(tmp_path)))
    made = native.compiled()
    assert made.parent.parent == tmp_path and [*made.parent.iterdir()] == [made]
    monkeypatch.setattr(native.subprocess, "run", None)  # a second compilation would call it
    assert native.compiled() == made


@pytest.mark.parametrize("broken", ["no compiler", "a refusal", "no cache", "threads of their own"])
def test_without_them_torch_computes_and_the_log_says_why(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "envs", SimpleNamespace(VLLM_CACHE_ROOT=str(tmp_path / "cache")))
    if broken == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif broken == "a refusal":
        monkeypatch.setattr(native, "FLAGS", ("-no-such-flag",))
    elif broken == "no cache":
        (tmp_path / "cache").write_text("a file")
    else:
        monkeypatch.setattr(native, "_shares_threads", lambda loaded: False)
    native.logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            assert native.library.__wrapped__() is None  # the answer itself is cached
    finally:
        native.logger.removeHandler(caplog.handler)
    expected = {"no compiler": "no-such-compiler", "a refusal": "-no-such-flag", "no cache": "cache"}
    assert expected.get(broken, "another OpenMP library") in caplog.text
    assert "torch's operators take the place" in caplog.text


def test_the_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.library.__wrapped__() is None


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4, 8)
    assert not native.fits(x.half())
    assert not native.fits(x, x.bfloat16())
    assert not native.fits(x.T)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not native.fits(x)


@needs_kernels
def test_an_engine_runs_them(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    call = native._call
    monkeypatch.setattr(native, "_call", lambda name, *args: (called.append(name), call(name, *args))[1])
    llm = engines.get("llama")
    model = worker_of(llm).model_runner.get_model()
    assert type(model.model.layers[0].mlp.act_fn).__name__ == "Silu"
    options = {"learning_rate": 1e-4, "batch_size": 4, "steps": 1, "progress": False}
    llm.finetune(reviews(4), objective=SENTIMENT, method=LoZO(rank=2), **options)
    products = {"zo_panel_product"} if native.kind_of(torch.float32) else set()
    assert {*called} - {"zo_pack_panels"} == {"zo_gate", "zo_low_rank", "zo_attend", "zo_write_slots"} | products
