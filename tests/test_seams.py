"""One test for each trap of vLLM's internals that training would fall into. Each fails on a naive extension.

Where it is cheap, the naive way is run beside ours and shown to fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.request import RequestStatus

from tests.engines import SENTIMENT, Engines, client_of, members_as_requests, reviews, scheduler_of, worker_of
from vllm_zo import ConfigError, LoZO, SlotError
from vllm_zo.commands import COMMANDS_ATTR, SLOT_LORA_ID_BASE
from vllm_zo.compat.registry import names_in
from vllm_zo.engine.member_requests import MEMBER_CLIENT
from vllm_zo.engine.scheduler import slot_lora_request
from vllm_zo.worker.cpu.packed_weights import PackedWeights

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, logprobs=5)
PROMPTS = [
    "the story is dull",
    "a quiet , clever and moving story with a great ending",
    "nothing happens for two hours",
]
RUN: dict[str, Any] = {"objective": SENTIMENT, "batch_size": 4, "progress": False}


def top_logprob(llm: Any, prompt: str = PROMPTS[0], **kwargs: Any) -> float:
    """Log-probability of the best first token: one number that moves when any weight does."""
    output = llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0, logprobs=1), use_tqdm=False, **kwargs)
    return next(iter(output[0].outputs[0].logprobs[0].values())).logprob


@contextmanager
def job_in_progress(llm: Any, steps: int = 200, **options: Any) -> Iterator[Any]:
    """A job that has been started and not run to its end; cancelled afterwards."""
    runs: list[Any] = []

    class Started(Exception):
        pass

    def stop(run: Any, record: dict[str, Any]) -> None:
        if not runs:
            runs.append(run)
            raise Started

    with pytest.raises(Started):
        llm.finetune(reviews(16), steps=steps, callbacks=[stop], **{**RUN, **options})
    yield runs[0]
    runs[0].cancel()
    while scheduler_of(llm).has_requests():
        llm.llm_engine.step()


# --- fold -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fold_changes_what_the_base_answers_and_restore_brings_it_back(engines: Engines, dtype: str) -> None:
    llm = engines.get(dtype=dtype)
    before = top_logprob(llm)
    run = llm.finetune(
        reviews(16), steps=6, method=LoZO(interval=2, eps=1e-2), update_space="fold", learning_rate=1e-2, **RUN
    )
    after = top_logprob(llm)
    assert abs(after - before) > 1e-2
    llm.restore_base(run)
    assert top_logprob(llm) == pytest.approx(before, abs=1e-5)


def test_writing_the_weight_attribute_changes_nothing_when_weights_are_packed(engines: Engines) -> None:
    llm = engines.get()
    layer = worker_of(llm).model_runner.get_model().model.decoder.layers[0].fc1.base_layer
    assert layer.weight.numel() == 0, "float32 weights are prepacked by oneDNN: the attribute is empty"
    before = top_logprob(llm)
    layer.weight.data = torch.zeros(128, 64)  # the naive fold
    assert top_logprob(llm) == before
    layer.weight.data = torch.empty(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_weights_read_what_was_written_and_the_layer_multiplies_with_it(engines: Engines, dtype: str) -> None:
    model = worker_of(engines.get(dtype=dtype)).model_runner.get_model()
    base = PackedWeights()
    for layer in (
        model.model.decoder.layers[0].fc1.base_layer,
        model.model.decoder.layers[1].self_attn.qkv_proj.base_layer,
    ):
        original = base.read(layer)
        new = (original + torch.randn_like(original)).to(original.dtype)
        with base.edit(layer) as weight:
            weight.copy_(new)
        assert torch.equal(base.read(layer), new)
        for rows in (3, 200):  # widened products, where there are any, begin at MIN_TOKENS
            x = torch.randn(rows, original.shape[1]).to(original.dtype)
            with torch.inference_mode():
                y = layer.quant_method.apply(layer, x, None)
            assert torch.allclose(y, x @ new.T, rtol=2e-2, atol=1e-4)
        assert base.restore() == 1
        assert torch.equal(base.read(layer), original)


def test_a_fold_job_has_the_engine_to_itself(engines: Engines) -> None:
    llm = engines.get()
    with job_in_progress(llm, update_space="fold") as run, pytest.raises(ConfigError, match=f"job {run.job_id}.*bank"):
        llm.generate([PROMPTS[0]], GREEDY, use_tqdm=False)
    llm.restore_base(run)
    assert llm.generate([PROMPTS[0]], GREEDY, use_tqdm=False)


# --- KV cache ---------------------------------------------------------------------------------------------------------


def test_members_of_several_kv_blocks_run_with_prefix_caching_on(engines: Engines) -> None:
    llm = engines.get(enable_prefix_caching=True)
    long = [{"sentence": "a great film " * 25, "label": i % 2} for i in range(8)]  # ~80 tokens, blocks of 32
    with members_as_requests(llm):
        run = llm.finetune(long, steps=2, **RUN)
    assert all(record["finite"] for record in run.history)


def test_without_our_guard_long_members_crash_the_block_pool(engines: Engines) -> None:
    llm = engines.get(enable_prefix_caching=True)
    coordinator = scheduler_of(llm).kv_cache_manager.coordinator
    if "cache_blocks" not in vars(coordinator):
        pytest.skip("this vLLM keeps background requests out of the prefix cache by itself (patches/0004)")
    if "num_hashed_tokens" in names_in(
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.cache_blocks"
    ):
        pytest.skip("this vLLM caches no block that has no hash (0.33)")
    guard = coordinator.cache_blocks
    coordinator.cache_blocks = type(coordinator).cache_blocks.__get__(coordinator)
    try:
        with members_as_requests(llm), pytest.raises((IndexError, AssertionError)):
            llm.finetune([{"sentence": "a great film " * 25, "label": 0}] * 8, steps=1, **RUN)
    finally:
        coordinator.cache_blocks = guard
        scheduler = scheduler_of(llm)
        scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        for job_id in list(scheduler.zo.queue.unfinished):
            scheduler.zo.finish_early(job_id, cancel=True)
        worker_of(llm).model_runner.execute_model_state = None
        while scheduler.has_requests():
            llm.llm_engine.step()


def test_members_neither_enter_the_prefix_cache_nor_evict_it(engines: Engines) -> None:
    llm = engines.get(enable_prefix_caching=True, num_gpu_blocks_override=64)
    prompt = "the music is lovely , the pictures are great . " * 4
    llm.generate([prompt], GREEDY, use_tqdm=False)
    cached = llm.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens
    assert cached and cached >= 32
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    entries = len(pool.cached_block_hash_to_block)
    with members_as_requests(llm):
        llm.finetune([{"sentence": prompt, "label": i % 2} for i in range(8)], steps=20, **RUN)
    assert len(pool.cached_block_hash_to_block) == entries
    assert llm.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens == cached


def test_the_prefix_cache_is_reset_at_a_fold(engines: Engines) -> None:
    llm = engines.get(enable_prefix_caching=True)
    prompt = "nothing happens for two hours , and then it ends . " * 4
    llm.generate([prompt], GREEDY, use_tqdm=False)
    run = llm.finetune(reviews(16), steps=4, method=LoZO(interval=2), update_space="fold", learning_rate=1e-2, **RUN)
    assert not llm.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens
    llm.restore_base(run)
    assert not llm.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens


# --- adapter slots ----------------------------------------------------------------------------------------------------


def test_an_unmaterialised_or_evicted_slot_is_an_error_never_zeros(engines: Engines) -> None:
    llm = engines.get()
    llm.finetune(reviews(16), steps=1, **RUN)
    manager = worker_of(llm).model_runner.lora_manager
    for slot in (0, 1):  # the job has ended: its slots are evicted
        with pytest.raises(SlotError, match=f"slot {slot} is not materialised"):
            manager._apply_adapters({slot_lora_request(slot)})


def test_a_zo_adapter_cannot_be_loaded_by_another_road(engines: Engines) -> None:
    from vllm.lora.request import LoRARequest

    llm = engines.get()
    manager = worker_of(llm).model_runner.lora_manager
    with pytest.raises(SlotError, match="cannot be loaded"):
        manager.add_adapter(LoRARequest("x", 7, "zo-slot://0"))
    with pytest.raises(SlotError, match="not published on this engine"):
        manager.add_adapter(LoRARequest("x", 7, "zo://nobody/3"))
    assert 7 not in manager.list_adapters()


def test_zo_slots_survive_vllm_removing_all_adapters(engines: Engines) -> None:
    llm = engines.get()
    manager = worker_of(llm).model_runner.lora_manager
    manager.remove_all_adapters()
    assert manager._adapter_manager.lora_index_to_id == [None, SLOT_LORA_ID_BASE, SLOT_LORA_ID_BASE + 1]
    assert llm.finetune(reviews(16), steps=2, **RUN).status == "succeeded"


def test_two_versions_of_one_adapter_answer_apart_in_one_batch(engines: Engines) -> None:
    llm = engines.get(max_loras=2)
    run = llm.finetune(reviews(16), steps=6, learning_rate=3e-2, method=LoZO(eps=1e-2), **RUN)
    other = llm.finetune(reviews(16), steps=6, learning_rate=3e-2, method=LoZO(eps=1e-2), seed=1, **RUN)
    requests = [run.lora_request, other.lora_request]
    alone = [top_logprob(llm, lora_request=request) for request in requests]
    base = top_logprob(llm)
    together = llm.generate(
        [PROMPTS[0]] * 3,
        SamplingParams(max_tokens=1, temperature=0.0, logprobs=1),
        use_tqdm=False,
        lora_request=[*requests, None],
    )
    got = [next(iter(o.outputs[0].logprobs[0].values())).logprob for o in together]
    assert got == pytest.approx([*alone, base], abs=1e-4)
    assert len({round(x, 3) for x in got}) == 3, "the three answers must differ for the test to mean anything"


# --- scheduling -------------------------------------------------------------------------------------------------------


def step_with(llm: Any, prompts: list[str], max_tokens: int = 4) -> Any:
    """Add prompts and take one scheduling decision; returns the SchedulerOutput."""
    outputs: list[Any] = []
    scheduler = scheduler_of(llm)
    original = scheduler.schedule

    def spy(*args: Any, **kwargs: Any) -> Any:
        outputs.append(original(*args, **kwargs))
        return outputs[-1]

    scheduler.schedule = spy
    try:
        for i, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
            llm.llm_engine.add_request(f"serve-{i}-{id(outputs)}", prompt, params)
        llm.llm_engine.step()
    finally:
        scheduler.schedule = original
    return outputs[0]


def test_serving_requests_are_scheduled_before_members(engines: Engines) -> None:
    llm = engines.get(max_num_batched_tokens=64, max_num_seqs=8)
    with job_in_progress(llm):
        output = step_with(llm, [PROMPTS[1] + " and so on and so on"] * 8)
        serving = [r for r in output.num_scheduled_tokens if r.startswith("serve")]
        tokens = sum(n for r, n in output.num_scheduled_tokens.items() if r.startswith("serve"))
        assert len(serving) >= 3 and tokens > 50, "serving takes the step"
        while llm.llm_engine.has_unfinished_requests() and any(
            r.client_index != MEMBER_CLIENT for r in scheduler_of(llm).requests.values()
        ):
            llm.llm_engine.step()


def test_members_run_beside_serving_within_the_token_budget(engines: Engines) -> None:
    llm = engines.get(zo_training={"token_budget": 40})
    with job_in_progress(llm):
        output = step_with(llm, PROMPTS)
        members = {r: n for r, n in output.num_scheduled_tokens.items() if r.startswith("zo-")}
        assert members and sum(members.values()) <= 40
        assert len(members) % 2 == 0, "pairs start together"
        assert [r for r in output.num_scheduled_tokens if r.startswith("serve")][:1], "beside serving"


def test_member_outputs_never_reach_a_client_and_stats_keep_flowing(engines: Engines) -> None:
    llm = engines.get(disable_log_stats=False)
    core = llm.llm_engine.engine_core.engine_core
    seen = []
    with job_in_progress(llm):
        for _ in range(4):
            outputs, _ = core.step_fn()
            assert set(outputs) <= {0}
            assert not any(o.request_id.startswith("zo-") for e in outputs.values() for o in e.outputs)
            seen.append(outputs[0].scheduler_stats)
    assert all(stats is not None for stats in seen), "with only training in the engine, /metrics must not freeze"


def test_the_serving_adapter_limit_is_what_the_user_set(engines: Engines) -> None:
    llm = engines.get(max_loras=2)
    scheduler = scheduler_of(llm)
    assert scheduler.lora_config.max_loras == 2
    assert llm.llm_engine.vllm_config.lora_config.max_loras == 4  # allocated: the user's and the ZO slots


# --- pause, sleep, shutdown -------------------------------------------------------------------------------------------


def test_a_paused_engine_rests_and_the_job_goes_on_after_resume(engines: Engines) -> None:
    llm = engines.get()
    core = llm.llm_engine.engine_core.engine_core
    with job_in_progress(llm, steps=50) as run:
        core.pause_scheduler(mode="abort")
        for _ in range(5):
            core.step_fn()
        assert not core.scheduler.has_requests(), "a paused engine must become idle, not spin"
        step = len(run.history)
        core.resume_scheduler()
        run.wait()
        assert run.status == "succeeded" and len(run.history) == 50 > step


@pytest.mark.parametrize("members", [nullcontext, members_as_requests])
def test_pausing_does_not_change_the_trajectory(engines: Engines, members: Any) -> None:
    llm = engines.get()
    unbroken = llm.finetune(reviews(16), steps=12, **RUN)
    core = llm.llm_engine.engine_core.engine_core
    with members(llm), job_in_progress(llm, steps=12) as run:
        for _ in range(3):
            core.pause_scheduler(mode="abort")
            core.step_fn()
            core.resume_scheduler()
            core.step_fn()
        run.wait()
    assert [r["coefficients"] for r in run.history] == [r["coefficients"] for r in unbroken.history]


def test_a_job_sleeps_with_the_engine_and_goes_on_when_it_wakes(engines: Engines) -> None:
    """The CPU worker keeps its memory asleep; what the scheduler does is the same on every platform."""
    llm = engines.get()
    unbroken = llm.finetune(reviews(16), steps=12, **RUN)
    with job_in_progress(llm, steps=12) as run:
        llm.sleep(level=1)
        for _ in range(3):
            llm.llm_engine.engine_core.engine_core.step_fn()
        assert not scheduler_of(llm).has_requests(), "a sleeping engine must be idle"
        llm.wake_up()
        run.wait()
    assert [r["coefficients"] for r in run.history] == [r["coefficients"] for r in unbroken.history]


def test_draining_does_not_wait_for_a_training_job(engines: Engines) -> None:
    llm = engines.get()
    scheduler = scheduler_of(llm)
    with job_in_progress(llm):
        while any(r.client_index == MEMBER_CLIENT for r in scheduler.requests.values()):
            llm.llm_engine.step()
        assert scheduler.has_requests()
        scheduler.zo_draining = True
        try:
            for _ in range(3):
                llm.llm_engine.engine_core.engine_core.step_fn()
            assert not scheduler.has_requests()
        finally:
            scheduler.zo_draining = False


@pytest.mark.parametrize("members", [nullcontext, members_as_requests])
def test_the_step_path_has_no_rpc_beside_the_forward(
    engines: Engines, members: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engines.get()
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    calls: list[str] = []
    original = executor.collective_rpc

    def spy(method: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(method if isinstance(method, str) else method.__name__)
        return original(method, *args, **kwargs)

    monkeypatch.setattr(executor, "collective_rpc", spy)
    with members(llm):
        llm.finetune(reviews(16), steps=5, **RUN)
    assert set(calls) == {"execute_model", "sample_tokens"} - ({"sample_tokens"} if members is nullcontext else set())
    assert calls.count("execute_model") <= 5 + 3  # one a step; start, publish and stop ride on three more


def test_commands_are_plain_data_that_can_cross_a_process(engines: Engines) -> None:
    import pickle

    llm = engines.get()
    with job_in_progress(llm):
        output = step_with(llm, [])
        commands = getattr(output, COMMANDS_ATTR)
        assert len(pickle.dumps(commands)) < 20_000, "seeds and scalars, not tensors"
        assert getattr(pickle.loads(pickle.dumps(output)), COMMANDS_ATTR).members == commands.members


def test_client_calls_reach_the_scheduler_by_name(engines: Engines) -> None:
    with pytest.raises(ConfigError, match="job_id='nobody' is unknown"):
        client_of(engines.get()).call("zo_status", "nobody", 0)
