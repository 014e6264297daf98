"""Scores read by Triton kernels, through `score_members`, against float64. Without a GPU in Triton's interpreter."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.children import in_interpreter
from vllm_zo.commands import ScoreMember
from vllm_zo.objectives.base import EncodedExample, ScoringSequence
from vllm_zo.worker.head import Head
from vllm_zo.worker.loss_table import LossTable
from vllm_zo.worker.scoring import Present, score_members

VOCAB, PADDED, WIDTH, SPAN = 301, 320, 72, 128
"""Several spans of vocabulary, the last one shorter and no multiple of a tile; a padded head; inputs that fill no whole
block."""
CASES: tuple[tuple[torch.dtype, bool, float | None], ...] = (
    (torch.float32, False, None), (torch.float32, True, 5.0), (torch.float16, True, None), (torch.bfloat16, False, 5.0),
)  # fmt: skip
"""Type, whether the head has a bias, its soft cap."""
TOLERANCE = 2e-5
"""Sums of 72 products of size 1 in float32; logits of size 10."""


class OtherRank:
    """Stands for a tensor-parallel group whose other rank holds a part of the vocabulary that is never asked for."""

    world_size = 2

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat([x, torch.full_like(x, -torch.inf)], dim)


def make_head(dtype: torch.dtype, device: str, *, bias: bool, soft_cap: float | None, tp: Any = None) -> Head:
    weight = torch.randn(PADDED, WIDTH, device=device).to(dtype)
    lm_head = SimpleNamespace(weight=weight, bias=torch.randn(PADDED, device=device).to(dtype) if bias else None)
    lm_head.shard_indices = SimpleNamespace(org_vocab_start_index=7, org_vocab_end_index=7 + VOCAB)
    from vllm_zo.worker.cuda.head import TritonHead  # here: triton may be missing, and its interpreter chosen first

    return TritonHead(lm_head, SimpleNamespace(soft_cap=soft_cap, scale=0.7, org_vocab_size=VOCAB), tp)


def make_table(probes: int, device: str, draw: random.Random, lowest: int = 0) -> LossTable:
    """Three rows with candidate labels and two with a log-probability at some positions."""

    def label() -> int:
        return draw.randrange(lowest, VOCAB)

    tokens = tuple(range(9))
    labels = [ScoringSequence(tokens, (draw.randrange(9),), (label(), label(), VOCAB - 1), "labels") for _ in range(3)]
    texts = [ScoringSequence(tokens, (2, 5, 6, 8), (label(), lowest, VOCAB - 1, label()), "logprobs") for _ in range(2)]
    return LossTable.empty(tuple(EncodedExample((row,)) for row in [*labels, *texts]), probes, torch.device(device))


def members_of(tables: list[LossTable], draw: random.Random) -> list[Present]:
    """All members of the tables; one row of each in two chunks, as a prefill of its own length each."""
    present, first = [], 3
    for table in tables:
        for probe, row in product(range(len(table.cells_PC)), range(len(table.sequences))):
            pieces = [(0, 9)] if row else [(0, 4), (4, 5)]
            for done, count in pieces:
                member = ScoreMember("job", "group", f"{id(table)}/{probe}/{row}", (probe,), row, done)
                present.append(Present(member, probe, table, first, count))
                first += count
    draw.shuffle(present)
    return present


def exact_cells(head: Head, hidden: Tensor, present: list[Present], table: LossTable) -> Tensor:
    cells = torch.full(table.cells_PC.shape, torch.nan, dtype=torch.float64)
    weight = head.lm_head.weight[: head.stop - head.start].double().cpu()
    bias = 0 if head.lm_head.bias is None else head.lm_head.bias[: len(weight)].double().cpu()
    logits = hidden.double().cpu() @ weight.T + bias
    if head.soft_cap:
        logits = torch.tanh(logits / head.soft_cap) * head.soft_cap
    logits = logits * head.scale
    for member, probe, of_table, first, count, *_ in present:
        row = table.sequences[member.sequence]
        for i, position in enumerate(row.positions):
            if of_table is not table or not 0 <= position - member.num_computed_tokens < count:
                continue
            at, cell = logits[first + position - member.num_computed_tokens], table.offsets[member.sequence]
            if row.kind == "labels":
                ids = torch.tensor(row.label_ids) - head.start
                cells[probe, cell : cell + len(ids)] = at[ids]
            else:
                logprobs = at.log_softmax(-1)
                cells[probe, cell + i] = logprobs[row.label_ids[i] - head.start]
                cells[probe, cell + len(row.positions) + i] = logprobs.max()
    return cells


def check_cells(device: str) -> None:
    for seed, (dtype, bias, soft_cap) in enumerate(CASES):
        torch.manual_seed(seed)
        draw = random.Random(seed)
        head = make_head(dtype, device, bias=bias, soft_cap=soft_cap)
        tables = [make_table(probes, device, draw) for probes in (2, 1)]
        present = members_of(tables, draw)
        hidden = torch.randn(sum(p.tokens for p in present) + 3, WIDTH + 24, device=device).to(dtype)[:, :WIDTH]
        score_members(head, hidden, present)
        for table in tables:
            exact = exact_cells(head, hidden, present, table)
            assert not exact.isnan().any()
            torch.testing.assert_close(table.cells_PC.double().cpu(), exact, rtol=0, atol=TOLERANCE)


def check_one_rank(device: str) -> None:
    """Of a vocabulary that is cut between ranks: labels are numbered through, and padding has no part in the sum."""
    torch.manual_seed(0)
    draw = random.Random(0)
    head = make_head(torch.float32, device, bias=True, soft_cap=None, tp=OtherRank())
    table = make_table(1, device, draw, lowest=head.start)
    present = members_of([table], draw)
    hidden = torch.randn(sum(p.tokens for p in present) + 3, WIDTH, device=device)
    score_members(head, hidden, present)
    exact = exact_cells(head, hidden, present, table)
    torch.testing.assert_close(table.cells_PC.double().cpu(), exact, rtol=0, atol=TOLERANCE)


def check_not_finite(device: str) -> None:
    """A hidden state that is not finite reaches its own cells only, and those always."""
    torch.manual_seed(0)
    head = make_head(torch.float32, device, bias=False, soft_cap=None)
    for value in (math.nan, math.inf):
        hidden = torch.randn(2, WIDTH, device=device)
        hidden[0, 3] = value
        table = make_table(2, device, random.Random(0))
        label, text = 0, 3
        rows = [
            Present(ScoreMember("", "", "", (p,), row, table.sequences[row].positions[0]), p, table, p, 1)
            for p, row in product((0, 1), (label, text))
        ]
        score_members(head, hidden, rows)
        offset = table.offsets[text]
        for cell in (*range(3), offset):
            assert not table.cells_PC[0, cell].isfinite() and table.cells_PC[1, cell].isfinite()


CHECKS = (check_cells, check_one_rank, check_not_finite)
IN_A_CHILD = """
from tests.children import widen_products
from tests.test_triton_scores import CHECKS, SPAN
from vllm_zo.worker.cuda import triton_scores
widen_products()
triton_scores.SPAN = SPAN
for check in CHECKS:
    check("cpu")
"""


def test_in_the_interpreter() -> None:
    in_interpreter(IN_A_CHILD)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_zo.worker.cuda import triton_scores

    monkeypatch.setattr(triton_scores, "SPAN", SPAN)
    check("cuda")
