"""Rows that are left out of a forward: the plan alone, and that the engine's numbers do not change with it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from tests.engines import SENTIMENT, Engines, reviews, worker_of
from vllm_zo import LanguageModeling, LoZO
from vllm_zo.worker.cpu import pruned_forward
from vllm_zo.worker.cpu.row_plan import RowPlan, plan_rows
from vllm_zo.worker.platform import Chunk

LOSS_TOLERANCE = 2e-5
"""Nats: float32 rounding of a 2-layer model, whose products are of other sizes with and without the left-out rows."""


def test_the_example_of_the_docstring() -> None:
    plan = plan_rows([Chunk(3, "s", (5, 7, 9), (2,)), Chunk(4, "s", (5, 7, 8, 4), (3,))])
    assert [t.tolist() for t in (plan.keep_U, plan.expand_T, plan.needed_P)] == [
        [0, 1, 2, 5, 6],
        [0, 1, 2, 0, 1, 3, 4],
        [2, 4],
    ]
    assert plan.shares and plan.prunes
    plan = plan_rows([Chunk(3, "+", (5, 7, 9), (2,)), Chunk(4, "-", (5, 7, 8, 4), (3,))])
    assert plan.first_D.tolist() == [0, 1, 2, 5, 6]
    assert plan.spread_U.tolist() == [0, 1, 2, 0, 1, 3, 4]
    assert plan.repeats and not plan.shares and plan.whole is None


def test_other_requests_and_continued_members_keep_every_row() -> None:
    plan = plan_rows([Chunk(4), Chunk(3, "s", (), (1,)), Chunk(3, "s", (), ())])
    assert plan.keep_U.tolist() == plan.expand_T.tolist() == list(range(10))
    assert plan.needed_P.tolist() == [0, 1, 2, 3, 5]


def test_a_plan_merges_rows_of_equal_state_and_history_and_no_others() -> None:
    rng = random.Random(0)
    for _ in range(50):
        chunks, history, alike = [], [], []
        for _ in range(rng.randint(1, 8)):
            state = rng.choice(["plus", "minus", None])
            tokens = tuple(rng.choices((1, 2), k=rng.randint(1, 6)))
            ours = state is not None and rng.random() < 0.8
            chunks.append(Chunk(len(tokens), state, tokens if ours else (), (len(tokens) - 1,)))
            own = () if ours else (object(),)  # nothing else is equal to this chunk's rows
            history += [(state, *own, tokens[: i + 1]) for i in range(len(tokens))]
            alike += [(*own, token, i) for i, token in enumerate(tokens)]
        plan = plan_rows(chunks)
        merged: dict[int, set[Any]] = {}
        for row, past in zip(plan.expand_T.tolist(), history, strict=True):
            merged.setdefault(row, set()).add(past)
        assert all(len(pasts) == 1 for pasts in merged.values()), "one row, one history"
        assert len(merged) == len(set(history)) == len(plan.keep_U), "one history, one row"
        assert plan.keep_U.tolist() == sorted(plan.keep_U.tolist())
        assert [history[i] for i in plan.keep_U] == [next(iter(merged[u])) for u in range(len(merged))]
        kept = [alike[i] for i in plan.keep_U]
        assert [kept[plan.first_D[d]] for d in plan.spread_U] == kept, "alike before the first attention"
        assert len(plan.first_D) == len(set(kept))


def test_a_plan_has_whole_sequences_where_all_are_and_only_there() -> None:
    whole = Chunk(2, "+", (5, 7), (1,), whole=True)
    assert plan_rows([whole, replace(whole, state="-")]).whole is not None
    assert plan_rows([whole, replace(whole, whole=False)]).whole is None
    assert plan_rows([whole, Chunk(3)]).whole is None


PREFIX = "nothing happens for two hours , and then it ends , "
CASES: dict[str, dict[str, Any]] = {
    "opt": {},
    "llama": {"family": "llama"},
    "qwen2 with an instruction before every prompt": {"family": "qwen2", "prefix": PREFIX},
    "options as sequences share their prompt": {"objective": replace(SENTIMENT, mode="full")},
    "language modelling": {"objective": LanguageModeling(prompt_field="sentence", completion_field="sentence")},
    "in chunks": {"engine": {"max_num_batched_tokens": 24, "max_num_seqs": 8, "enable_chunked_prefill": True}},
    "serving beside it": {"traffic": True},
}


@pytest.mark.parametrize("name", CASES)
def test_losses_with_rows_left_out_are_those_of_the_whole_batch(
    engines: Engines, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    llm = engines.get(case.get("family", "opt"), **case.get("engine", {}))
    shared = worker_of(llm).zo.platform.rows
    assert shared.not_alone is None
    plans: list[RowPlan] = []
    monkeypatch.setattr(pruned_forward, "plan_rows", lambda *a: plans.append(plan_rows(*a)) or plans[-1])
    rows = [{**row, "sentence": case.get("prefix", "") + row["sentence"]} for row in reviews(16, seed=2)]

    def ask(run: Any, record: dict[str, Any]) -> None:
        if case.get("traffic"):
            params = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=1)
            llm.llm_engine.add_request(f"ask-{record['step']}", "one long string of cliches", params)

    def losses() -> torch.Tensor:
        run = llm.finetune(
            rows, objective=case.get("objective", SENTIMENT), method=LoZO(eps=2e-2, interval=3), learning_rate=1e-3,
            batch_size=4, steps=6, callbacks=[ask], progress=False,
        )  # fmt: skip
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        return torch.tensor([record["loss"] for record in run.history])

    def check_plans() -> None:
        assert any(p.prunes for p in plans), "otherwise this test shows nothing"
        assert any(p.shares for p in plans) or "engine" in case  # a chunk of so few tokens holds one row of a state
        plans.clear()

    alone = losses()
    check_plans()
    monkeypatch.setattr(shared, "not_alone", "to compare")
    as_requests = losses()
    check_plans()
    monkeypatch.setattr(shared, "refused", "to compare")
    whole = losses()
    assert not plans
    assert torch.allclose(as_requests, whole, atol=LOSS_TOLERANCE, rtol=0)
    if "engine" in case or "traffic" in case:
        assert torch.allclose(alone, whole, atol=LOSS_TOLERANCE, rtol=0)
    else:
        assert torch.equal(alone, as_requests), "the same rows, the same products"


@pytest.mark.parametrize("family", ["opt", "llama", "qwen2"])
def test_every_linear_layer_leaves_rows_out(engines: Engines, family: str) -> None:
    """Merged ones too, which have an `apply` of their own from vLLM 0.32 on."""
    manager = worker_of(engines.get(family)).model_runner.lora_manager._adapter_manager
    linear = [layer for layer in manager.modules.values() if isinstance(layer, BaseLinearLayerWithLoRA)]
    assert linear
    assert all("apply" in vars(layer) for layer in linear)
