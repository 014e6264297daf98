"""Probes that change the LM head alone share the KV of their prompts, with each other and with requests to the base."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from tests.engines import Engines, scheduler_of
from vllm_zo import LoZO, Reward

BLOCK, TOKENS, STEPS, ROWS, BATCH = 32, 6, 4, 8, 4
QUESTION = "one of the finest and most moving films of the year , with a cast that knows what it does and a story that "
QUESTION = f"{QUESTION}never lets go of those who watch it : {{word}} , and it was"
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=1)


def variety(completions: list[str], **columns: Any) -> list[float]:
    return [len(set(text)) / 10 for text in completions]


@pytest.fixture
def llm(engines: Engines) -> Any:
    llm = engines.get("llama")
    llm.reset_prefix_cache()
    return llm


def train(llm: Any, **options: Any) -> tuple[Any, int]:
    """A job, and how many tokens its members had."""
    before = scheduler_of(llm).zo_tokens["training"]
    run = llm.finetune(
        [{"word": word} for word in ("grand", "fine", "good", "great", "dull", "flat", "poor", "bleak")][:ROWS],
        **{
            "objective": Reward(QUESTION, reward=variety, max_tokens=TOKENS), "target_modules": "lm_head", "bases": 2,
            "method": LoZO(eps=0.3, interval=2), "learning_rate": 1e-2, "batch_size": BATCH, "steps": STEPS,
            "divergence_factor": None, "progress": False,
        } | options,
    )  # fmt: skip
    return run, scheduler_of(llm).zo_tokens["training"] - before


def test_the_probes_of_a_prompt_and_later_epochs_compute_its_blocks_once(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = len(llm.get_tokenizer()(QUESTION.format(word="grand"))["input_ids"])
    assert prompt > BLOCK, "or nothing can be shared"
    shared, tokens = train(llm)
    with monkeypatch.context() as patch:
        patch.setattr("vllm_zo.engine.lane.LM_HEAD", None)
        apart, all_tokens = train(llm)
    assert [record["reward"] for record in shared.history] == [record["reward"] for record in apart.history]
    # Each of the rows' prompts begins alike, so that all but the first member of all find at least one block.
    saved = (2 * BATCH * STEPS - 1) * BLOCK
    assert all_tokens - tokens >= saved, (tokens, all_tokens)


def test_what_a_job_of_other_weights_writes_is_its_own(llm: Any) -> None:
    llm.generate(QUESTION.format(word="grand"), GREEDY, use_tqdm=False)  # puts the block into the prefix cache
    _, tokens = train(llm, target_modules="all-linear")
    prompt = len(llm.get_tokenizer()(QUESTION.format(word="grand"))["input_ids"])
    assert tokens >= 2 * BATCH * STEPS * prompt


def test_requests_to_the_base_find_blocks_that_are_theirs(llm: Any) -> None:
    prompt = QUESTION.format(word="grand")
    before = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    llm.reset_prefix_cache()
    train(llm, learning_rate=1.0)  # far from the base by the end
    after = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    assert after.num_cached_tokens and not before.num_cached_tokens
    assert after.outputs[0].token_ids == before.outputs[0].token_ids
    # A forward in parts rounds otherwise.
    for ours, theirs in zip(after.outputs[0].logprobs, before.outputs[0].logprobs, strict=True):
        assert max(ours.values(), key=_value).logprob == pytest.approx(
            max(theirs.values(), key=_value).logprob, abs=1e-4
        )


def _value(entry: Any) -> float:
    return float(entry.logprob)
