"""Words that a job of the LM head does not move are summed once for each scored position."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engines import Engines, reviews, worker_of
from tests.test_target_layers import LOSS_TOLERANCE
from vllm_zo import LanguageModeling, LoZO, MultipleChoice
from vllm_zo.objectives.base import EncodedExample, ScoringSequence
from vllm_zo.worker import head as head_module
from vllm_zo.worker import unmoved as unmoved_module
from vllm_zo.worker.head import Head
from vllm_zo.worker.loss_table import LossTable
from vllm_zo.worker.trainer import Trainer
from vllm_zo.worker.unmoved import Scored, UnmovedWords

VOCAB, WIDTH, RANK, SLOTS = 50, 16, 3, 2
STEPS, BATCH, ROWS = 10, 4, 12
TOLERANCE = 2e-5
"""Sums of 16 products of size 1 in float32; logits of size 10."""


@pytest.mark.parametrize("kept", ["batch", "others", ""])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("moved", [[3], [0, 7, 8, 31, 49], list(range(VOCAB))], ids=["one", "some", "all"])
def test_scores_are_those_of_the_whole_vocabulary_in_float64(
    monkeypatch: pytest.MonkeyPatch, soft_cap: float | None, bias: bool, moved: list[int], kept: str
) -> None:
    monkeypatch.setattr(head_module, "VOCAB_CHUNK", 8)
    monkeypatch.setattr(head_module, "TOKEN_CHUNK", 3)
    if kept != "batch":
        monkeypatch.setattr(unmoved_module, "ROOM", 5 * len(moved))
    if not kept:
        monkeypatch.setattr(unmoved_module, "MOST_TOKENS", 11)  # the sequences have 12
    torch.manual_seed(0)
    lm_head = SimpleNamespace(weight=torch.randn(VOCAB + 6, WIDTH), bias=torch.randn(VOCAB + 6) if bias else None)
    a, b = torch.randn(SLOTS, 1, RANK, WIDTH), torch.zeros(SLOTS, 1, VOCAB, RANK)
    processor = SimpleNamespace(
        soft_cap=soft_cap, scale=0.7, org_vocab_size=VOCAB, lora_a_stacked=a, lora_b_stacked=b
    )  # fmt: skip
    head, unmoved = Head(lm_head, processor), UnmovedWords(torch.tensor(moved))
    sequences = [
        ScoringSequence((5, 6, i), (0, 1, 2), (3, 7 * i, 40), "logprobs") for i in range(4)
    ]  # labels that the job moves, and others
    hidden = torch.randn(3 * len(sequences), WIDTH)
    calls: list[int] = []
    monkeypatch.setattr(Head, "without", _counting(Head.without, calls))
    for step, slots in enumerate(([0, 1, None], [1, 0, 1])):
        b[:, :, moved] = torch.randn(SLOTS, 1, len(moved), RANK)  # the probes of a step
        table = LossTable.empty(tuple(EncodedExample((s,)) for s in sequences), len(slots), torch.device("cpu"))
        scored = [Scored(table, p, i, 3 * i, slots[p]) for i in range(4) for p in range(len(slots))]
        assert unmoved.knows(scored) == (kept == "batch" and step > 0)
        assert not unmoved.knows(scored[3:]), "a part of the batch is another one"
        unmoved.score(head, None if unmoved.knows(scored) else hidden, scored)
        for p, slot in enumerate(slots):
            weight = lm_head.weight[:VOCAB].double()
            if slot is not None:
                weight = weight + (b[slot, 0] @ a[slot, 0]).double()
            logits = hidden.double() @ weight.T
            logits = logits if lm_head.bias is None else logits + lm_head.bias[:VOCAB].double()
            logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
            logprobs = (0.7 * logits).log_softmax(-1).view(4, 3, VOCAB)
            labels = torch.tensor([s.label_ids for s in sequences])
            expected = torch.cat([logprobs.gather(2, labels[:, :, None])[..., 0], logprobs.amax(-1)], 1)
            torch.testing.assert_close(table.cells_PC[p].double(), expected.flatten(), atol=TOLERANCE, rtol=TOLERANCE)
    assert calls == ([12] if kept else [12, 12]), "the second time everything is known"


def _counting(original: Any, rows: list[int]) -> Any:
    def counted(self: Head, hidden: Any, *args: Any) -> Any:
        rows.append(len(hidden))
        return original(self, hidden, *args)

    return counted


TEXTS = [{"prompt": row["sentence"], "completion": f" {row['sentence'][:9]}"} for row in reviews(ROWS, seed=4)]
UNSEEN = [{"prompt": row["sentence"], "completion": f" {row['sentence'][-9:]}"} for row in reviews(6, seed=5)]
CHOICES = [
    {"prompt": row["sentence"], "choices": ["good film", "dull"], "label": row["label"]}
    for row in reviews(ROWS, seed=4)
]
TASKS: dict[str, tuple[Any, Any, Any]] = {
    "texts": (LanguageModeling(), TEXTS, UNSEEN),
    "choices": (MultipleChoice(template="{prompt}"), CHOICES, CHOICES[:5]),
}


@pytest.mark.parametrize("v", ["normal", "activations"])
@pytest.mark.parametrize("task", TASKS)
def test_a_job_learns_the_same_and_reads_the_whole_head_in_the_first_epoch_only(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, task: str, v: Any
) -> None:
    llm = engines.get("llama")
    objective, rows, validation = TASKS[task]

    def train() -> tuple[list[float], list[float], float]:
        worker_of(llm).zo.platform.forget_states()
        run = llm.finetune(
            rows, validation, objective=objective, method=LoZO(rank=2, interval=2, eps=0.1, v=v, u="written"),
            target_modules="lm_head", bases=2, learning_rate=1e-2, batch_size=BATCH, steps=STEPS, eval_interval=5,
            divergence_factor=None, progress=False,
        )  # fmt: skip
        tested = llm.evaluate(validation, objective, run=run)["loss"]
        return [r["loss"] for r in run.history], [e["eval_loss"] for e in run.evaluations], tested

    chunks: list[int] = []
    logits = Head._logits

    def of_the_whole_head_counted(self: Head, hidden: Any, slots: Any) -> Any:
        chunks.append(len(hidden))
        return logits(self, hidden, slots)

    monkeypatch.setattr(Head, "_logits", of_the_whole_head_counted)
    losses, evaluations, tested = train()
    few = sum(chunks)
    chunks.clear()
    monkeypatch.setattr(Trainer, "_unmoved_words", lambda self, member: None)
    expected, expected_evaluations, expected_test = train()
    assert losses == pytest.approx(expected, abs=LOSS_TOLERANCE) and len(set(losses)) == STEPS
    assert evaluations == pytest.approx(expected_evaluations, abs=LOSS_TOLERANCE)
    assert tested == pytest.approx(expected_test, abs=LOSS_TOLERANCE)
    assert few < sum(chunks) / 3, "of 10 steps of two probes and three epochs, and of four evaluations"
