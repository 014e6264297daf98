"""Noise: published Philox vectors first, then what the training relies on (addressing, agreement, statistics)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.children import in_interpreter
from vllm_zo import noise
from vllm_zo.noise import ElementRanges, cpu, philox

MASK32 = 0xFFFFFFFF
# kat_vectors of Random123 (D. E. Shaw Research), lines "philox4x32 10": counter words, key words, result words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def philox_scalar(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 on Python integers, written from the paper's figure."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & MASK32, p0 >> 32 ^ c[3] ^ k[1], p0 & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return c


def bits_scalar(key: int, module: str, element: int) -> int:
    """The documented layout of counter and key, one element at a time."""
    block, high = element // 4, noise.module_id(module)
    counter = [block & MASK32, block >> 32, high & MASK32, high >> 32]
    return philox_scalar(counter, [key & MASK32, key >> 32])[element % 4]


def hex_words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def blocks_of(first: list[int], count: list[int], high: list[int]) -> philox.Blocks:
    return philox.Blocks(np.array(first, np.uint64), np.array(count, np.int64), np.array(high, np.uint64))


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
@pytest.mark.parametrize("implementation", [philox.words, philox.words_torch])
def test_philox_gives_the_published_answers(
    implementation: Callable[[int, philox.Blocks], torch.Tensor], counter: str, key: str, answer: str
) -> None:
    c, k = hex_words(counter), hex_words(key)
    assert philox_scalar(c, k) == hex_words(answer)
    words = implementation(k[0] | k[1] << 32, blocks_of([c[0] | c[1] << 32], [1], [c[2] | c[3] << 32]))
    assert [word & MASK32 for word in words[:, 0].tolist()] == hex_words(answer)


def test_numba_and_torch_give_the_same_integers() -> None:
    assert philox._numba_loops() is not None, "numba comes with vLLM; without it this test compares torch with itself"
    rng = random.Random(0)
    first = [0, 2**32 - 3, 2**64 - 5, *(rng.getrandbits(64) for _ in range(20))]
    count = [9, 7, 4, *(rng.randrange(40) for _ in range(20))]
    blocks = blocks_of(first, count, [rng.getrandbits(64) for _ in first])
    for key in (0, 2**64 - 1, rng.getrandbits(64)):
        assert torch.equal(philox.words(key, blocks), philox.words_torch(key, blocks))


def test_noise_is_the_same_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = ElementRanges.of([("a", 0, 1000), ("b", 3, 501)])
    normal, bits = noise.normal(3, ranges, "cpu"), noise.uniform_bits(3, ranges, "cpu")
    monkeypatch.setattr(philox, "_numba_loops", lambda: None)
    assert torch.equal(noise.normal(3, ranges, "cpu"), normal)
    assert torch.equal(noise.uniform_bits(3, ranges, "cpu"), bits)


def test_each_element_has_the_documented_counter() -> None:
    rng = random.Random(1)
    starts = [0, 1, 2**34 - 2, *(rng.randrange(2**40) for _ in range(10))]  # 2**34 elements: the counter's second word
    pieces = [(f"layers.{i}.q_proj", start, start + 5) for i, start in enumerate(starts)]
    key = noise.derive_key(0, "U", 7)
    expected = [bits_scalar(key, name, element) for name, start, stop in pieces for element in range(start, stop)]
    assert noise.uniform_bits(key, ElementRanges.of(pieces), "cpu").tolist() == expected


def test_frozen_values() -> None:
    """A change here makes every seed log written so far replay to another adapter."""
    key = noise.derive_key(17, "V", 3)
    assert key == 8760279034910957164
    ranges = ElementRanges.of([("model.decoder.layers.0.fc1", 2, 8)])
    frozen = torch.tensor([-1.1503202, 0.1293313, -0.0281509, -0.3403381, 1.0698477, 0.8890912])
    torch.testing.assert_close(noise.normal(key, ranges, "cpu"), frozen, rtol=1e-5, atol=1e-6)


pieces = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 60), st.integers(0, 30)).map(lambda t: (t[0], t[1], t[1] + t[2])),
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(pieces=pieces, key=st.integers(0, 2**64 - 1))
def test_any_slice_equals_the_slice_of_the_whole(pieces: list[tuple[str, int, int]], key: int) -> None:
    ranges = ElementRanges.of(pieces)
    assert ranges.counts == [stop - start for _, start, stop in pieces]
    assert ranges.total == sum(ranges.counts)
    for draw in (noise.normal, noise.uniform_bits):
        whole = {name: draw(key, ElementRanges.of([(name, 0, 90)]), "cpu") for name in "abc"}
        parts = [whole[name][start:stop] for name, start, stop in pieces]
        assert torch.equal(draw(key, ranges, "cpu"), torch.cat([whole["a"][:0], *parts]))


def test_slices_agree_across_the_chunks_of_the_float_stage() -> None:
    total = 4 * cpu._CHUNK + 4000
    whole = noise.normal(5, ElementRanges.of([("m", 0, total)]), "cpu")
    for start, stop in ((4 * cpu._CHUNK - 7, total), (1, 4 * cpu._CHUNK + 9)):
        assert torch.equal(noise.normal(5, ElementRanges.of([("m", start, stop)]), "cpu"), whole[start:stop])


def test_modules_of_equal_shape_and_different_keys_share_no_noise() -> None:
    n = 4096
    both = noise.normal(1, ElementRanges.of([("layers.0.fc1", 0, n), ("layers.1.fc1", 0, n)]), "cpu")
    other_key = noise.normal(2, ElementRanges.of([("layers.0.fc1", 0, n)]), "cpu")
    streams = torch.stack([*both.split(n), other_key])
    correlation = torch.corrcoef(streams) - torch.eye(3)
    assert correlation.abs().max() < 5 / math.sqrt(n)  # five standard errors of an empirical correlation of 0
    assert torch.unique(streams).numel() > 0.99 * streams.numel()


def test_normals_have_the_moments_and_the_distribution_of_a_standard_normal() -> None:
    n = 1 << 19
    x = noise.normal(2024, ElementRanges.of([(f"m{i}", 0, n // 8) for i in range(8)]), "cpu").double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 4 * math.sqrt(variance / n), f"moment {power}"
    cdf = torch.special.ndtr(x.sort().values)
    steps = torch.arange(n + 1) / n
    kolmogorov_smirnov = max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    assert kolmogorov_smirnov < 1.63 / math.sqrt(n)  # the 1 % point
    for lag in (1, 2, 3, 4, 8):  # words of one counter, neighbouring counters
        assert abs((x[lag:] * x[:-lag]).mean()) < 4 / math.sqrt(n), f"lag {lag}"


def test_uniform_bits_set_every_bit_half_of_the_time() -> None:
    n = 1 << 16
    bits = noise.uniform_bits(9, ElementRanges.of([("m", 0, n)]), "cpu")
    assert bits.dtype == torch.int64 and bits.min() >= 0 and bits.max() <= MASK32
    share = torch.stack([(bits >> i & 1).double().mean() for i in range(32)])
    assert (share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(n)


def test_normals_equal_box_muller_in_float64() -> None:
    ranges = ElementRanges.of([("m", 0, 100_000)])
    bits = noise.uniform_bits(4, ranges, "cpu")
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).view(-1, 2, 2)
    # float32 keeps 24 of the 31 bits, and near u1 = 1 the logarithm magnifies that: the reference starts from the same
    # rounded words, so that only the arithmetic is compared.
    words = signed.float().double()
    u1 = words[..., 0].abs().clamp(min=0.25) / 2**31
    radius, angle = (-2 * u1.log()).sqrt(), math.pi * words[..., 1] / 2**31
    reference = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten()
    # a few ulp of the radius (at most 6.8) for log, sqrt and product, and as much for the rounded angle (at most pi)
    assert (noise.normal(4, ranges, "cpu").double() - reference).abs().max() < 3e-6


def test_extreme_words_give_finite_normals() -> None:
    words = torch.tensor([[0, 1, -(2**31), 2**31 - 1], [0, 0, -(2**31), 2**31 - 1]], dtype=torch.int32)
    out = torch.empty(4, 4)
    cpu._box_muller(torch.cat((words, words)), out)
    assert torch.isfinite(out).all()
    assert out[0, 0] == pytest.approx(math.sqrt(66 * math.log(2)))  # u1 = 2**-33, the largest normal there is
    assert out[2, 0] == 0.0  # u1 = 1


def test_noise_repeats_and_leaves_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    ranges = ElementRanges.of([("m", 0, 300_000)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = noise.normal(8, ranges, "cpu")
        torch.set_num_threads(2)
        second = noise.normal(8, ranges, "cpu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_of_different_paths_differ() -> None:
    paths = [(), (1,), (-1,), (12,), (1, 2), (2, 1), ("1", 2), (1, "2"), ("12",), ("",), ("", ""), ("ab",), ("i1:1",)]
    keys = [noise.derive_key(*path) for path in paths]
    assert len(set(keys)) == len(paths)
    assert all(0 <= key < 2**64 for key in keys)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"range 5:4 of module 'm'"):
        ElementRanges.of([("m", 5, 4)])
    for key in (-1, 2**64):
        with pytest.raises(ValueError, match=f"key={key}: expected an unsigned 64-bit"):
            noise.normal(key, ElementRanges.of([("m", 0, 4)]), "cpu")
    with pytest.raises(TypeError):
        noise.derive_key(1.5)  # type: ignore[arg-type]


PIECES = [("a", 0, 1300), ("b", 3, 501), ("none", 5, 5), ("c", 2**34 - 7, 2**34 + 50), ("a", 1300, 1302)]
IN_A_CHILD = """
from tests.test_noise import check_fused_sum, check_launch_table, check_triton_agrees
check_launch_table()
check_fused_sum("cpu")
check_triton_agrees("cpu")
"""


def check_launch_table() -> None:
    """The example of its docstring, and an empty table."""
    from vllm_zo.noise import triton as triton_noise

    module = noise.module_id("m")
    signed = module - 2**64 if module >> 63 else module
    table = triton_noise.launch_table(ElementRanges.of([("z", 0, 100), ("m", 6, 3006)]))
    assert table[1:].tolist() == [[first, signed, 6, 3006, 94] for first in (1, 257, 513)]
    assert triton_noise.fill(1, ElementRanges.of([]), torch.device("cpu"), torch.float32).shape == (0,)


def check_fused_sum(device: str) -> None:
    """`add`, against the float64 sum of the noise that `fill` makes, and against the plain path."""
    from vllm_zo.noise import triton as triton_noise

    ranges = ElementRanges.of(PIECES)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 16):
        keys = [noise.derive_key(count, k) for k in range(count)]
        assert count < 16 or max(keys) >> 63, "one that is negative where it is passed signed"
        weights, theta = torch.randn(count, generator=generator), torch.randn(ranges.total, generator=generator)
        on_device = [tensor.to(device) for tensor in (theta, weights)]
        added = triton_noise.add(on_device[0], keys, on_device[1], -0.25, ranges).cpu()
        assert torch.equal(on_device[0].cpu(), theta), "out of place"
        drawn = [triton_noise.fill(key, ranges, torch.device(device), torch.float32).cpu().double() for key in keys]
        terms = torch.stack([theta.double(), *(-0.25 * w.double() * n for w, n in zip(weights, drawn, strict=True))])
        # Each of the K products and sums is rounded once, by half an eps of at most the sum of the terms' sizes.
        bound = (count + 2) * torch.finfo(torch.float32).eps * terms.abs().sum(0)
        assert ((added.double() - terms.sum(0)).abs() <= bound).all()
        plain = noise.add_normals(theta, keys, weights, -0.25, ranges)
        assert ((added - plain).abs() <= 2 * bound + 3e-6 * 0.25 * weights.abs().sum()).all()  # 3e-6: as below


def check_triton_agrees(device: str) -> None:
    from vllm_zo.noise import triton as triton_noise

    ranges = ElementRanges.of(PIECES)
    for key in (5, 2**64 - 1):  # the largest is negative where it is passed signed
        bits = triton_noise.fill(key, ranges, torch.device(device), torch.int32)
        assert torch.equal(bits.cpu(), noise.uniform_int32(key, ranges, "cpu"))
        normals = triton_noise.fill(key, ranges, torch.device(device), torch.float32)
        # a few ulp of the radius (at most 6.8): two libraries' log, sqrt, cos and sin
        assert (normals.cpu() - noise.normal(key, ranges, "cpu")).abs().max() < 3e-6


def test_the_triton_kernel_agrees_in_the_interpreter() -> None:
    in_interpreter(IN_A_CHILD, OMP_NUM_THREADS="1")


@pytest.mark.gpu
def test_the_triton_kernel_agrees_on_a_gpu() -> None:
    check_fused_sum("cuda")
    check_triton_agrees("cuda")
