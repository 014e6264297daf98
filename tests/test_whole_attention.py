"""Attention of whole sequences without a KV cache: the layout, the numbers, and where an engine takes that road.

Numbers inside an engine are compared with vLLM's own attention by `test_rows.py`: its losses with nothing left out come
from a forward that goes through the KV cache.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import SamplingParams

from tests.engines import SENTIMENT, Engines, members_as_requests, reviews, worker_of
from vllm_zo import Classification, LoZO, Reward
from vllm_zo.worker.cpu import attention as whole_attention
from vllm_zo.worker.cpu import native
from vllm_zo.worker.cpu.row_plan import MOST_PADDING, plan_rows, whole_sequences
from vllm_zo.worker.platform import Chunk


def test_the_examples_of_the_docstrings() -> None:
    whole = whole_sequences([[0, 1, 2], [0, 1, 3, 4]])
    assert whole.longest == 4
    buckets, unpadded = whole.buckets, whole.unpadded
    assert buckets.shapes == ((2, 4),)
    assert buckets.gather_P.tolist() == [0, 1, 3, 4, 0, 1, 2, 2]
    assert buckets.back_U.tolist() == [4, 5, 6, 2, 3]
    assert unpadded.starts.tolist() == [0, 4, 7]
    assert unpadded.rows_S.tolist() == [0, 1, 3, 4, 0, 1, 2]
    assert unpadded.first_S.tolist() == [1, 1, 1, 1, 0, 0, 1]


def random_sequences(rng: random.Random, longest: int = 40) -> list[Chunk]:
    """Few different tokens, so that sequences of a state often begin alike."""
    made = []
    for _ in range(rng.randint(1, 12)):
        tokens = tuple(rng.choices((1, 2), k=rng.randint(1, longest)))
        made.append(Chunk(len(tokens), rng.choice("+-"), tokens, (), whole=True))
    return made


def test_every_row_is_in_its_sequence_and_little_is_padded() -> None:
    rng = random.Random(0)
    for _ in range(50):
        chunks = random_sequences(rng)
        plan = plan_rows(chunks)
        assert plan.whole is not None
        buckets = plan.whole.buckets
        rows = [part.tolist() for part in plan.expand_T.split([c.rows for c in chunks])]
        padded, start = [], 0
        for count, length in buckets.shapes:
            padded += buckets.gather_P[start : start + count * length].view(count, length).tolist()
            start += count * length
        assert start == len(buckets.gather_P) <= MOST_PADDING * sum(c.rows for c in chunks)
        unpadded = sorted(rows, key=len, reverse=True)
        assert [p[: len(r)] for p, r in zip(padded, unpadded, strict=True)] == unpadded
        assert buckets.gather_P[buckets.back_U].tolist() == list(range(len(plan.keep_U)))
        assert [b for _, b in buckets.shapes] == sorted((b for _, b in buckets.shapes), reverse=True)


def naive(layer: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(T, heads * D) of one sequence in float64, row by row and head by head."""
    group = layer.num_heads // layer.num_kv_heads
    q = query.double().view(len(query), layer.num_heads, -1)
    k, v = (x.double().view(len(x), layer.num_kv_heads, -1) for x in (key, value))
    out = torch.empty_like(q)
    window = layer.impl.sliding_window
    for t in range(len(q)):
        seen = slice(0 if window == -1 else max(t + 1 - window, 0), t + 1)
        for head in range(layer.num_heads):
            scores = (k[seen, head // group] @ q[t, head]) * layer.impl.scale
            out[t, head] = scores.softmax(0) @ v[seen, head // group]
    return out.flatten(1)


@pytest.mark.parametrize("kernel", [True, False], ids=["our kernel", "torch"])
@pytest.mark.parametrize(("kv_heads", "window"), [(4, -1), (2, -1), (1, -1), (4, 5), (2, 1)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)],  # entries near 1: sums of some ten float32 terms; two roundings
)
def test_attention_is_that_of_each_sequence_alone(
    kv_heads: int, window: int, dtype: torch.dtype, tolerance: float, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(native, "library", lambda: None)
    rng = random.Random(1)
    generator = torch.Generator().manual_seed(0)
    layer = SimpleNamespace(
        num_heads=4, num_kv_heads=kv_heads, head_size=32, impl=SimpleNamespace(scale=0.3, sliding_window=window)
    )
    for _ in range(5):
        chunks = random_sequences(rng, longest=12)
        plan = plan_rows(chunks)
        assert plan.whole is not None
        packed = torch.randn(len(plan.keep_U), (4 + 2 * kv_heads) * 32, generator=generator).to(dtype)
        qkv = packed.split([4 * 32, kv_heads * 32, kv_heads * 32], 1)  # views, as a packed layer makes them
        ours = whole_attention.attend(layer, *qkv, plan.whole)
        assert ours.dtype == dtype and ours.shape == (len(plan.keep_U), 4 * 32)
        for rows in plan.expand_T.split([c.rows for c in chunks]):
            alone = naive(layer, *(x[rows] for x in qkv))
            assert torch.allclose(ours[rows].double(), alone, atol=tolerance, rtol=0)


def test_what_plain_causal_attention_lacks_is_refused(engines: Engines) -> None:
    runner = worker_of(engines.get("llama")).model_runner
    (layer, *_) = runner.compilation_config.static_forward_context.values()
    assert whole_attention.why_not(layer) is None
    for name, value, word in [
        ("alibi_slopes", torch.ones(4), "ALiBi"),
        ("logits_soft_cap", 30.0, "soft cap"),
        ("sinks", torch.ones(4), "sinks"),
        ("is_fp8_kv_cache", True, "quantised"),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer.impl, name, value)
            assert word in (whole_attention.why_not(layer) or "")


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of every call of `attend`."""
    calls: list[int] = []
    attend = whole_attention.attend

    def counted(layer: Any, query: Tensor, *args: Any) -> Tensor:
        calls.append(len(query))
        return attend(layer, query, *args)

    monkeypatch.setattr(whole_attention, "attend", counted)
    yield calls


def train(llm: Any, rows: list[dict[str, Any]], objective: Any = SENTIMENT, **options: Any) -> Any:
    options = {"steps": 4, "callbacks": []} | options
    return llm.finetune(
        rows, objective=objective, method=LoZO(eps=2e-2), learning_rate=1e-3, batch_size=4, progress=False, **options
    )


@pytest.mark.parametrize("members", [nullcontext, members_as_requests])
def test_steps_of_whole_sequences_write_nothing_to_the_kv_cache(
    engines: Engines, attended: list[int], members: Any
) -> None:
    llm = engines.get("opt")
    caches = worker_of(llm).model_runner.kv_caches
    for cache in caches:
        cache.fill_(torch.nan)
    try:
        with members(llm):
            run = train(llm, reviews(16, seed=3))
        assert len(attended) == 4 * 2, "each step, both layers"
        assert all(torch.isfinite(torch.tensor(record["loss"])) for record in run.history)
        assert all(cache.isnan().all() for cache in caches)
    finally:
        for cache in caches:
            cache.zero_()


def test_a_step_with_other_requests_in_it_goes_through_the_cache(engines: Engines, attended: list[int]) -> None:
    llm = engines.get("opt")
    before: list[int] = []

    def ask(run: Any, record: dict[str, Any]) -> None:
        before.append(len(attended))
        if record["step"] == 2:
            params = SamplingParams(max_tokens=2, temperature=0.0)
            llm.llm_engine.add_request("beside", "one long string of cliches", params)

    train(llm, reviews(16, seed=3), steps=6, callbacks=[ask])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert [b - a for a, b in zip([0, *before], before, strict=False)] == [2, 2, 0, 0, 2, 2]


def test_sequences_that_are_cut_or_go_on_use_the_cache(engines: Engines, attended: list[int]) -> None:
    options = {"max_num_batched_tokens": 24, "max_num_seqs": 8, "enable_chunked_prefill": True}
    long = [{**row, "sentence": row["sentence"] + " a great cast" * 10} for row in reviews(8, seed=4)]
    train(engines.get("opt", **options), long)
    assert not attended, "no prompt fits a step"

    reward = Reward(
        "{sentence}", reward=lambda completions, **columns: [float(len(c)) for c in completions], max_tokens=3
    )
    train(engines.get("opt"), reviews(8, seed=5), objective=reward)
    assert not attended, "members that write need what they wrote"


def test_no_request_ever_reuses_blocks_of_members(engines: Engines) -> None:
    """They are empty: a prefix hit on them would answer from nothing."""
    llm = engines.get("opt", enable_prefix_caching=True)
    prompt = " ".join(row["sentence"] for row in reviews(6, seed=6))
    llm.reset_prefix_cache()
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1)
    (fresh,) = llm.generate(prompt, params)
    assert len(fresh.prompt_token_ids) > 2 * 32, "more than a block"
    llm.reset_prefix_cache()

    rows = [{"sentence": prompt, "label": i % 2} for i in range(8)]
    with members_as_requests(llm):
        train(llm, rows, objective=Classification("{sentence}", [" terrible", " great"]))
    (after,) = llm.generate(prompt, params)
    assert after.num_cached_tokens == 0
    (token,) = fresh.outputs[0].token_ids
    pair = [output.outputs[0].logprobs[0][token].logprob for output in (fresh, after)]
    assert pair[0] == pytest.approx(pair[1], abs=1e-5)
    (again,) = llm.generate(prompt, params)
    assert again.num_cached_tokens, "the cache itself works, or this test shows nothing"
