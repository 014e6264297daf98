"""A fold by the Triton kernel, against float64 and against the plain road. Without a GPU in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.children import in_interpreter
from vllm_zo.methods import fold

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[1:]
KEYS = (5, 2**64 - 1)
"""The second is negative where it is passed signed."""
SHAPES = ((1, 1), (37, 11), (18, 516), (3, 1031))
"""Less than a tile, lines that begin inside a counter, and several tiles of which the last is not full."""


def folded(weight: Tensor, u: Tensor, v: Tensor | None, key: int, device: str, **place: Any) -> Tensor:
    """The kernel's result, on the CPU."""
    from vllm_zo.worker.cuda.triton_fold import fold_into  # here: triton may be missing

    return fold_into(weight.to(device), u.to(device), None if v is None else v.to(device), key, "m", **place).cpu()


def draw(dtype: torch.dtype, outs: int, ins: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outs, ins, generator=generator).to(dtype)
    u, v = 1e-2 * torch.randn(outs, rank, generator=generator), torch.randn(ins, rank, generator=generator)
    return weight, u, v


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(kind), b.view(kind))


def check_exact(device: str) -> None:
    """Where no float32 sum is rounded, the result is the plain road's, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for outs, ins in SHAPES:
            weight = (torch.randint(-512, 512, (outs, ins), generator=generator) / 256).to(dtype)
            u, v = (2.0 ** torch.randint(-5, 3, (n, 2), generator=generator) for n in (outs, ins))
            for key, factors in zip(KEYS, ((u, v), (u @ v.T, None)), strict=True):
                plain = fold.fold_into(weight, *factors, key, "m")
                assert same_bits(folded(weight, *factors, key, device), plain), (dtype, outs, ins)


def check_random(device: str) -> None:
    """Against float64: the sum within the rounding of float32, then one of its two neighbours. Against the plain road:
    the same but where the two float32 sums lie on two sides of the noise, which is one element in some thousands."""
    differing = elements = 0
    for seed, dtype in enumerate(DTYPES):
        for rank in (1, 20):
            for outs, ins in SHAPES:
                weight, u, v = draw(dtype, outs, ins, rank, seed)
                ours, plain = folded(weight, u, v, 9, device), fold.fold_into(weight, u, v, 9, "m")
                exact = weight.double() + u.double() @ v.double().T
                size = weight.double().abs() + u.double().abs() @ v.double().abs().T
                bound = (rank + 2) * torch.finfo(torch.float32).eps * size
                # One step of the type, at the larger side of the sum; beneath float16's normal numbers half of it.
                step = 0.0
                if dtype != torch.float32:
                    limits = torch.finfo(dtype)
                    step = exact.abs().clamp_min(limits.smallest_normal) * limits.eps
                    differing += int((ours != plain).sum())
                    elements += ours.numel()
                assert ((ours.double() - exact).abs() <= step + bound).all(), (dtype, rank, outs, ins)
                assert ((ours.double() - plain.double()).abs() <= step + 2 * bound).all()
    assert elements > 40_000 and differing <= elements / 1000, (differing, elements)


def check_parts(device: str) -> None:
    """Parts of a module on several ranks, and modules that lie in one weight, are folded bit for bit as the whole."""
    for dtype in DTYPES:
        for outs, ins, half, first in ((12, 520, 260, 0), (12, 10, 4, 0), (12, 519, 257, 0), (6, 8, 4, 2**33 + 4)):
            weight, u, v = draw(dtype, outs, ins, 3)
            whole = folded(weight, u, v, 7, device, first_element=first)
            for o in (slice(0, outs // 2), slice(outs // 2, outs)):  # as column-parallel layers are cut
                part = folded(weight[o], u[o], v, 7, device, first_element=first + o.start * ins)
                assert same_bits(part, whole[o])
            for i in (slice(0, half), slice(half, ins)):  # as row-parallel layers are
                part = folded(weight[:, i], u, v[i], 7, device, first_element=first + i.start, stride=ins)
                assert same_bits(part, whole[:, i])
    from vllm_zo.worker.cuda.triton_fold import fold_into

    packed = draw(torch.bfloat16, 30, 40, 2)[0].to(device)
    before, rows = packed.clone().cpu(), slice(7, 19)
    _, u, v = draw(torch.bfloat16, 12, 40, 2)
    fold_into(packed[rows], u.to(device), v.to(device), 7, "m", out=packed[rows])
    after = packed.cpu()
    assert same_bits(after[rows], folded(before[rows], u, v, 7, device))
    assert not torch.equal(after[rows], before[rows])
    assert torch.equal(after[:7], before[:7]) and torch.equal(after[19:], before[19:]), "the other modules of the layer"


def check_far_elements(device: str) -> None:
    """Elements beyond 2**31 and 2**32 of a module have the noise of their number."""
    weight, u, v = torch.ones(5, 32, dtype=torch.bfloat16), torch.full((5, 1), 2.0**-8), torch.ones(32, 1)
    for first, stride in ((2**31 - 16, 40), (2**33 + 5, 33), (2**20, 2**31 + 4)):
        plain = fold.fold_into(weight, u, v, 3, "m", first_element=first, stride=stride)
        assert same_bits(folded(weight, u, v, 3, device, first_element=first, stride=stride), plain)


def check_unbiased(device: str) -> None:
    """Only the two neighbours, the upper one with the probability of the fraction."""
    outs, ins = 80, 512
    for dtype in HALVES:
        for sign in (1, -1):
            for fraction in (0.01, 0.75):
                low, high = sign * 1.0, sign * (1.0 + torch.finfo(dtype).eps)
                change = torch.tensor(low + fraction * (high - low)) - low  # exact: the two are close
                weight, u = torch.full((outs, ins), low, dtype=dtype), change.expand(outs, 1)
                result = folded(weight, u, torch.ones(ins, 1), 1, device).double()
                assert set(result.unique().tolist()) == {low, high}
                share = float(change) / (high - low)
                standard_error = math.sqrt(share * (1 - share) / result.numel())
                assert abs((result == high).double().mean() - share) < 4.5 * standard_error, (dtype, fraction)


def check_not_in_range(device: str) -> None:
    """Float16 subnormals and what is too large round to nearest, infinity and NaN stay."""
    smallest, largest = torch.finfo(torch.float16).smallest_normal, torch.finfo(torch.float16).max
    generator = torch.Generator().manual_seed(0)
    change = (torch.rand(20, 24, generator=generator) * 2 - 1) * smallest
    change[3, :4] = torch.tensor([largest * (1 + 2.0**-13), largest * (1 - 2.0**-13), math.inf, math.nan])
    weight = torch.zeros(20, 24, dtype=torch.float16)
    plain = fold.fold_into(weight, change, None, 2, "m")
    ours = folded(weight, change, None, 2, device)
    assert torch.equal(ours.nan_to_num(7.0), plain.nan_to_num(7.0)) and torch.equal(ours.isnan(), plain.isnan())
    # Triton's interpreter cuts bfloat16 off where hardware rounds it, so only what is no matter of rounding.
    for value in (math.inf, -math.inf, math.nan):
        weight = torch.ones(2, 8, dtype=torch.bfloat16)
        weight[1, 3] = value
        ours = folded(weight, *(torch.ones(n, 1) for n in (2, 8)), 2, device)
        assert not ours[1, 3].isfinite() and ours.isfinite().sum() == 15


CHECKS = (check_exact, check_random, check_parts, check_far_elements, check_unbiased, check_not_in_range)
IN_A_CHILD = """
from tests.test_triton_fold import CHECKS
for check in CHECKS:
    check("cpu")
"""


def test_in_the_interpreter() -> None:
    in_interpreter(IN_A_CHILD)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check: Callable[[str], None]) -> None:
    check("cuda")
