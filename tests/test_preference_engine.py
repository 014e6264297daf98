"""Preferences in the engine, against a naive DPO on a plain Hugging Face model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SENTENCES
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engines import Engines, members_as_requests, scheduler_of
from tests.reference import ReferenceTrainer
from tests.trajectories import Trajectory, cut_copy
from vllm_zo import LoZO, MeZO, Preference
from vllm_zo.data import BatchOrder, encode_examples
from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import EncodedExample
from vllm_zo.slot_fit import resolve_bases

STEPS, BATCH, SEED, EPS, BETA = 6, 4, 3, 2e-2, 0.5
LOZO = LoZO(rank=2, interval=3, eps=EPS)
JOB: dict[str, Any] = {
    "objective": Preference(beta=BETA), "method": LOZO, "learning_rate": 3e-4, "batch_size": BATCH, "steps": STEPS,
    "seed": SEED, "progress": False,
}  # fmt: skip
LOSS_TOLERANCE = 1e-4
"""Sums of some 20 float32 log-probabilities, times beta; two of them in a difference."""


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    words, rng = " ".join(SENTENCES).split(), random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(2, most)))

    return [{"prompt": text(8), "chosen": f" {text(6)}", "rejected": f" {text(6)}"} for _ in range(count)]


class NaiveDPO:
    """-log sigmoid(beta * ((lp_c - ref_c) - (lp_r - ref_r))), pair by pair, with references of its own model."""

    name = "naive"

    def __init__(self, base: Any) -> None:
        self.base = base.double().eval()

    @torch.no_grad()
    def _of_base(self, tokens: Sequence[int], answer: int) -> Tensor:
        logits = self.base(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
        return logits[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])][-answer:].sum()

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        (cells,) = cells_PC.double()
        losses = []
        for example in examples:
            gains = []
            for answer in example.sequences:
                count = len(answer.label_ids)
                own, cells = cells[:count], cells[2 * count :]
                gains.append(own.sum() - self._of_base([*answer.token_ids, answer.label_ids[-1]], count))
            losses.append(-torch.nn.functional.logsigmoid(BETA * (gains[0] - gains[1])))
        return torch.stack(losses)[None], torch.zeros(1, len(losses))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shards": 2},
        {"update_space": "fold"},
        {"method": MeZO(eps=EPS), "learning_rate": 1e-5},
    ],
    ids=["bank", "log path", "fold", "in the base weights"],
)
def test_the_engine_follows_a_naive_dpo(engines: Engines, options: dict[str, Any]) -> None:
    llm, rows, job = engines.get(), pairs(24), {**JOB, **options}
    run = llm.finetune(rows, **job)
    path = engines.model("opt")
    model, base = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    space = run.config.space
    oracle = ReferenceTrainer(
        model, job["method"], NaiveDPO(base), job_seed=SEED, update_space=space,
        num_bases=resolve_bases(job["method"], space, STEPS, 16, None),
    )  # fmt: skip
    examples = encode_examples(rows, Preference(), AutoTokenizer.from_pretrained(path), 128, "rows")
    order, losses = BatchOrder(len(rows), BATCH, SEED), []
    for step, record in enumerate(run.history):
        expected, coefficients = oracle.step(step, [examples[i] for i in order.batch(step)], job["learning_rate"])
        assert record["loss"] == pytest.approx(expected.mean().item(), abs=LOSS_TOLERANCE), f"step {step}"
        assert record["coefficients"] == pytest.approx(coefficients.tolist(), abs=LOSS_TOLERANCE / EPS), f"step {step}"
        losses.append(record["loss"])
    assert len(losses) == STEPS and max(abs(loss - 0.6931) for loss in losses) > 100 * LOSS_TOLERANCE
    if space == "fold":
        with pytest.raises(ConfigError, match=r"objective=Preference\(.*a `fold` run has changed the base"):
            llm.evaluate(rows, run=run)
        llm.restore_base(run)


def test_the_base_scores_each_row_once_and_a_resumed_job_asks_no_more(engines: Engines, tmp_path: Path) -> None:
    llm, rows = engines.get(), pairs(40)
    twice = [*rows, rows[0]]
    options = {**JOB, "steps": 2 * STEPS, "eval_interval": 4, "keep_best": False}
    whole = llm.finetune(twice, pairs(5, seed=9), **options)
    kept = json.loads((whole.directory / "reference.json").read_text())
    assert len(kept) == 45, "40 different rows of training, though 48 are read; and 5 of validation"
    half = cut_copy(whole.directory, tmp_path / "half", 5)
    (half / "reference.json").write_text(json.dumps({key: [0.0, 0.0] for key in kept}))
    other = llm.finetune(twice, pairs(5, seed=9), resume_from=half, **options)
    assert other.history[-1]["loss"] != whole.history[-1]["loss"], "a resumed job reads what was kept"
    again = cut_copy(whole.directory, tmp_path / "again", 5)
    (again / "reference.json").write_bytes((whole.directory / "reference.json").read_bytes())
    assert Trajectory.of(llm, llm.finetune(twice, pairs(5, seed=9), resume_from=again, **options)) == Trajectory.of(
        llm, whole
    )


def test_only_rows_that_are_read_are_scored_by_the_base(engines: Engines) -> None:
    run = engines.get().finetune(pairs(40), **{**JOB, "steps": 3})
    assert len(json.loads((run.directory / "reference.json").read_text())) == 3 * BATCH


def test_a_resumed_job_without_the_file_asks_the_base_and_not_its_own_state(engines: Engines, tmp_path: Path) -> None:
    llm, rows = engines.get(), pairs(24)
    options = {**JOB, "learning_rate": 3e-3}
    whole = llm.finetune(rows, **options)
    half = cut_copy(whole.directory, tmp_path / "half", 3)
    resumed = llm.finetune(rows, resume_from=half, **options)
    ours, theirs = (json.loads((d / "reference.json").read_text()) for d in (half, whole.directory))
    assert ours.keys() == theirs.keys()
    for key, of_one in ours.items():
        assert of_one == pytest.approx(theirs[key], abs=1e-3)
    assert resumed.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], abs=1e-3)


def test_an_evaluation_reports_reward_accuracy_and_margin(engines: Engines) -> None:
    llm, rows, held_out = engines.get(), pairs(24), pairs(10, seed=4)
    run = llm.finetune(rows, held_out, **{**JOB, "learning_rate": 3e-3, "keep_best": False})
    first, last = run.evaluations[0], run.evaluations[-1]
    assert first["eval_loss"] == pytest.approx(0.6931, abs=1e-4) and first["eval_margin"] == pytest.approx(0, abs=1e-3)
    assert abs(last["eval_margin"]) > 0.05 and 0 <= last["eval_accuracy"] <= 1
    after = llm.evaluate(held_out, run=run)
    assert after["loss"] == pytest.approx(last["eval_loss"], abs=1e-4)
    assert after["margin"] == pytest.approx(last["eval_margin"], abs=1e-3)
    assert after["accuracy"] == last["eval_accuracy"]
    assert llm.evaluate(held_out, Preference())["margin"] == pytest.approx(0, abs=1e-3)
    with members_as_requests(llm):
        beside = llm.evaluate(held_out, run=run)
    assert beside["margin"] == pytest.approx(after["margin"], abs=1e-3)
    assert not scheduler_of(llm).zo.has_work()


def test_training_prefers_the_chosen_answers(engines: Engines) -> None:
    """What every chosen answer has in common is learnt: reward accuracy rises from half to nearly all."""
    llm = engines.get()
    rows = [replace_answers(row) for row in pairs(32)]
    run = llm.finetune(rows, rows, **{**JOB, "learning_rate": "auto", "steps": 60, "batch_size": 16})
    assert run.evaluations[-1]["eval_accuracy"] > 0.9 and run.evaluations[-1]["eval_margin"] > 0.1


def replace_answers(row: dict[str, str]) -> dict[str, str]:
    return {"prompt": row["prompt"] + " . It was", "chosen": " great", "rejected": " terrible"}


def test_a_fold_job_that_lost_the_file_is_refused(engines: Engines, tmp_path: Path) -> None:
    llm, rows = engines.get(), pairs(24)
    options = {**JOB, "update_space": "fold", "method": replace(LOZO, interval=2)}
    run = llm.finetune(rows, **options)
    llm.restore_base(run)
    half = cut_copy(run.directory, tmp_path / "half", 5)
    with pytest.raises(Exception, match="lacks what the base said of 24 examples"):
        llm.finetune(rows, resume_from=half, **options)
