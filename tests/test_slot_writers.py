"""Factors in their slots: every writer against the formula, in slots of any strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.children import in_interpreter
from vllm_zo.worker.cpu import native
from vllm_zo.worker.cpu.slot_writer import LoopWriter
from vllm_zo.worker.slot_writers import Piece, SlotWriter

SLOTS, COLUMNS = 3, 16
IN_A_CHILD = "from tests.test_slot_writers import check_triton; check_triton('cpu')"


def check(
    make: Callable[[Sequence[Piece], int], SlotWriter], dtype: torch.dtype, device: str, rounding: float = 0.0
) -> None:
    """B (contiguous), A (transposed), and a shard that starts in the middle of its factor.

    Args:
        rounding: relative difference allowed: 0 means bit for bit.
    """
    generator = torch.Generator().manual_seed(0)
    for rank in (1, 2, 5):
        b = torch.full((SLOTS, 1, 700, COLUMNS), 7.0, dtype=dtype, device=device)  # 3,500 elements: several programs
        a = torch.full((SLOTS, 1, COLUMNS, 33), 7.0, dtype=dtype, device=device)
        pieces = [Piece(b[:, 0], 0), Piece(a[:, 0].transpose(1, 2), 700 * rank + 20 * rank)]
        flat = torch.randn(700 * rank + 60 * rank, generator=generator)
        make(pieces, rank).write(flat.to(device), slot=1, block=2, factor=0.25)
        for slots, offset in ((b[:, 0], 0), (a[:, 0].transpose(1, 2), 720 * rank)):
            rows = slots.shape[1]
            expected = torch.full((SLOTS, rows, COLUMNS), 7.0, dtype=dtype)
            part = flat[offset : offset + rows * rank].view(rows, rank)
            expected[1, :, 2 * rank : 3 * rank] = (part * 0.25).to(dtype)
            difference = (slots.cpu().double() - expected.double()).abs()
            assert (difference <= rounding * expected.double().abs()).all(), "the block, and nothing beside it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [True, False], ids=["our kernel", "torch"])
def test_slots_hold_what_the_formula_says(dtype: torch.dtype, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(native, "library", lambda: None)
    check(LoopWriter, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_numbers_are_left_as_they_are(dtype: torch.dtype) -> None:
    flat, rows = torch.zeros(50, 2), torch.tensor([3, 4, 40])
    flat[rows] = torch.randn(3, 2)
    whole, some = torch.zeros(SLOTS, 50, COLUMNS, dtype=dtype), torch.full((SLOTS, 50, COLUMNS), 7.0, dtype=dtype)
    LoopWriter([Piece(whole, 0)], 2).write(flat.flatten(), slot=1, block=2, factor=0.25)
    LoopWriter([Piece(some, 0)], 2).write(flat.flatten(), slot=1, block=2, factor=0.25, rows=rows)
    assert whole[1, rows, 4:6].all() and torch.equal(some[1, rows, 4:6], whole[1, rows, 4:6])
    some[1, rows, 4:6] = 7.0
    assert (some == 7.0).all(), "nothing beside them"


def check_triton(device: str) -> None:
    from vllm_zo.worker.cuda.triton_slots import OneLaunchWriter

    make: Any = OneLaunchWriter
    check(make, torch.float32, device)
    check(make, torch.float16, device)
    # Triton's interpreter cuts bfloat16 off where hardware rounds it: a unit in the last place.
    check(make, torch.bfloat16, device, rounding=2.0**-7 if device == "cpu" else 0.0)


@pytest.mark.slow
def test_the_triton_kernel_writes_the_same_in_the_interpreter() -> None:
    in_interpreter(IN_A_CHILD)


@pytest.mark.gpu
def test_the_triton_kernel_writes_the_same_on_a_gpu() -> None:
    check_triton("cuda")
