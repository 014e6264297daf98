"""Folding: right in expectation, exact where the result is representable, repeatable from the key."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_zo.methods import fold
from vllm_zo.methods.fold import fold_into, stochastic_round

HALVES = [torch.bfloat16, torch.float16]
N = 40_000


def neighbours(dtype: torch.dtype) -> tuple[float, float]:
    """1 and the next number above it."""
    return 1.0, 1.0 + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES)
def test_the_parts_of_a_module_on_several_ranks_are_folded_as_the_whole(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    outs, ins = 12, 10
    weight = torch.randn(outs, ins, generator=generator).to(dtype)
    u, v = 1e-2 * torch.randn(outs, 2, generator=generator), torch.randn(ins, 2, generator=generator)
    whole = fold_into(weight, u, v, 5, "m")
    for o in (slice(0, 6), slice(6, 12)):  # as column-parallel layers are cut
        part = fold_into(weight[o], u[o], v, 5, "m", first_element=o.start * ins)
        assert torch.equal(part, whole[o])
    for i in (slice(0, 4), slice(4, 10)):  # as row-parallel layers are
        part = fold_into(weight[:, i], u, v[i], 5, "m", first_element=i.start, stride=ins)
        assert torch.equal(part, whole[:, i])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("exponent", [-12, 0, 5])
def test_rounding_is_unbiased_and_gives_only_the_two_neighbours(
    dtype: torch.dtype, sign: int, fraction: float, exponent: int
) -> None:
    low, high = (sign * side * 2.0**exponent for side in neighbours(dtype))
    value = torch.tensor(low + fraction * (high - low))
    rounded = stochastic_round(value.expand(N), dtype, key=1, module="m").double()
    assert set(rounded.tolist()) == {low, high}
    share_up = (value.double() - low) / (high - low)
    standard_error = math.sqrt(share_up * (1 - share_up) / N)
    assert abs((rounded == high).double().mean() - share_up) < 4.5 * standard_error


@pytest.mark.parametrize("dtype", HALVES)
def test_representable_values_stay_exactly_as_they_are(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    edges = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, limits.tiny / 4, math.inf, -math.inf])
    values = torch.cat((torch.randn(5000, generator=torch.Generator().manual_seed(0)), edges)).to(dtype)
    for key in range(5):
        rounded = stochastic_round(values.float(), dtype, key, "m")
        assert torch.equal(rounded.view(torch.int16), values.view(torch.int16))  # bits: -0.0 is not 0.0


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_not_finite_or_too_large_rounds_as_usual(dtype: torch.dtype) -> None:
    # the last NaN has all bits set: adding noise to its pattern would wrap around to zero
    nans = torch.tensor([0x7FC00000, 0x7F800001, -1, 0x7FFFFFFF]).to(torch.int32).view(torch.float32)
    assert stochastic_round(nans, dtype, 0, "m").isnan().all()
    above = torch.full((N,), torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 8), dtype=torch.float32)
    assert torch.equal(stochastic_round(above, dtype, 0, "m"), above.to(dtype))
    below = torch.full((N,), torch.finfo(dtype).max * (1 - torch.finfo(dtype).eps / 8), dtype=torch.float32)
    assert stochastic_round(below, dtype, 0, "m").isfinite().all()


def test_float16_subnormals_round_to_nearest() -> None:
    smallest = torch.finfo(torch.float16).smallest_normal
    values = (torch.rand(N, generator=torch.Generator().manual_seed(0)) * 2 - 1) * smallest
    assert torch.equal(stochastic_round(values, torch.float16, 3, "m"), values.to(torch.float16))


def test_equal_keys_round_alike_and_others_do_not() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    first = stochastic_round(values, torch.bfloat16, 7, "m")
    assert torch.equal(first, stochastic_round(values, torch.bfloat16, 7, "m"))
    for key, module in ((8, "m"), (7, "n")):
        assert not torch.equal(first, stochastic_round(values, torch.bfloat16, key, module))


def test_a_part_rounds_as_it_does_within_the_whole() -> None:
    values = torch.randn(999, generator=torch.Generator().manual_seed(0))
    whole = stochastic_round(values, torch.float16, 7, "m")
    assert torch.equal(stochastic_round(values[333:], torch.float16, 7, "m", first_element=333), whole[333:])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("elements", [1, 50, 1 << 20])
def test_folding_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, elements: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 11, generator=generator).to(dtype)
    # small powers of two: the float32 sum is exact, whatever order a matrix product of another size adds in
    u, v = (2.0 ** torch.randint(-3, 3, shape, generator=generator) for shape in ((37, 2), (11, 2)))
    expected = stochastic_round(weight.float() + u @ v.T, dtype, 5, "m")
    before = weight.clone()
    monkeypatch.setattr(fold, "_CHUNK_ELEMENTS", elements)
    assert torch.equal(fold_into(weight, u, v, 5, "m"), expected)
    assert torch.equal(weight, before)
    assert fold_into(weight, u, v, 5, "m", out=weight) is weight
    assert torch.equal(weight, expected)


def test_float32_folds_by_plain_addition() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, u, v = (torch.randn(shape, generator=generator) for shape in ((30, 20), (30, 2), (20, 2)))
    reference = weight.double() + u.double() @ v.double().T
    # three float32 roundings of numbers below 16
    folded = fold_into(weight, u, v, 0, "m")
    torch.testing.assert_close(folded.double(), reference, rtol=0, atol=3e-6)
    assert torch.equal(fold_into(weight, u, v, 0, "m", out=weight), folded)
    assert torch.equal(weight, folded)


@pytest.mark.parametrize("dtype", HALVES)
def test_steps_far_below_half_an_ulp_add_up(dtype: torch.dtype) -> None:
    """What rounding to nearest loses entirely: 200 folds of a fiftieth of an ulp."""
    ulp, folds, shape = torch.finfo(dtype).eps, 200, (60, 60)
    step = 0.02 * ulp
    weight = nearest = torch.ones(shape, dtype=dtype)
    u, v = torch.full((60, 1), step), torch.ones(60, 1)
    for key in range(folds):
        weight = fold_into(weight, u, v, key, "m")
        nearest = (nearest.float() + u @ v.T).to(dtype)
    assert torch.equal(nearest, torch.ones(shape, dtype=dtype))
    # each fold rounds up with probability 0.02: a binomial count of ulps an element
    standard_error = ulp * math.sqrt(folds * 0.02 * 0.98 / (60 * 60))
    assert abs(weight.double().mean() - 1 - folds * step) < 4.5 * standard_error


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"stochastic rounding to torch.float64 is not defined"):
        stochastic_round(torch.ones(4), torch.float64, 0, "m")
