"""Names of vLLM that mean something else from 0.33 on. Each test holds on every release that has the name.

`bash ci/matrix.sh --overlay 0.33.0` runs them, and the engine tests, on the Python files of that release.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engines import Engines, members_as_requests, reviews, scheduler_of, worker_of
from tests.test_multiprocess import wait_for_steps
from tests.test_seams import GREEDY, PROMPTS, RUN, job_in_progress, top_logprob
from tests.trajectories import Trajectory, train
from vllm_zo.commands import SLOT_LORA_ID_BASE

ENDLESS_ANSWER = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)


def test_has_request_knows_the_requests_of_clients_beside_members(engines: Engines) -> None:
    """vLLM 0.33 asks it of the scheduler whether an input belongs to an open session, before it refuses it."""
    llm = engines.get()
    scheduler = scheduler_of(llm)
    if not hasattr(scheduler, "has_request"):
        pytest.skip("this vLLM does not ask")
    with members_as_requests(llm), job_in_progress(llm):
        llm.llm_engine.add_request("mine", PROMPTS[0], ENDLESS_ANSWER)
        llm.llm_engine.step()
        mine = [r.request_id for r in scheduler.requests.values() if r.client_index == 0]
        assert len(mine) == 1 and scheduler.has_request(mine[0]) and not scheduler.has_request("other")
        llm.llm_engine.abort_request(["mine"])
        assert not scheduler.has_request(mine[0])


def test_an_adapter_that_fails_to_load_leaves_the_slots_of_training_alone(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM notes an adapter's slot before it has loaded it; from 0.33 on after that."""
    llm = engines.get()
    run = llm.finetune(reviews(16), steps=3, learning_rate=1e-2, **RUN)
    before = top_logprob(llm, lora_request=run.lora_request)
    manager = worker_of(llm).model_runner.lora_manager._adapter_manager
    ours = [lora_id for lora_id in manager.lora_index_to_id if lora_id and lora_id >= SLOT_LORA_ID_BASE]
    module = next(iter(manager.modules.values()))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory")

    manager.deactivate_adapter(run.lora_request.lora_int_id)
    monkeypatch.setattr(module, "set_lora", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        manager.activate_adapter(run.lora_request.lora_int_id)
    monkeypatch.undo()
    assert manager.lora_index_to_id[-len(ours) :] == ours
    manager.deactivate_adapter(run.lora_request.lora_int_id)
    manager.remove_adapter(run.lora_request.lora_int_id)
    assert top_logprob(llm, lora_request=run.lora_request) == pytest.approx(before, abs=1e-5)
    again = llm.finetune(reviews(16), steps=3, learning_rate=1e-2, **RUN)
    assert [r["coefficients"] for r in again.history] == [r["coefficients"] for r in run.history]


def test_members_do_not_keep_prompts_waiting_for_their_interval(engines: Engines) -> None:
    """With `prefill_schedule_interval` vLLM 0.33 holds prompts back for some steps after each step that had one."""
    llm = engines.get(prefill_schedule_interval=20)
    scheduler, engine = scheduler_of(llm), llm.llm_engine
    with members_as_requests(llm), job_in_progress(llm):
        engine.add_request("first", PROMPTS[0], ENDLESS_ANSWER)
        trained = []
        for _ in range(30):
            engine.step()
            trained.append(scheduler.zo_tokens["training"])
        assert trained[-1] > trained[20], "members run beside the answer"
        engine.add_request("second", PROMPTS[1], ENDLESS_ANSWER)
        engine.step()
        (second,) = (r for r in scheduler.requests.values() if r.request_id.startswith("second"))
        assert second.num_computed_tokens > 0, "the second prompt waits behind members"
        engine.abort_request(["first", "second"])


def test_a_paused_engine_refuses_requests_and_the_job_goes_on_after_it(
    engine_apart: Any,
) -> None:
    """From 0.33 on vLLM refuses what comes while it is paused. The bell that such a request rings is not answered, and
    must not stop every forward from then on."""
    core = engine_apart.llm_engine.engine_core
    unbroken = train(engine_apart, steps=300)
    run = train(engine_apart, steps=300, wait=False)
    wait_for_steps(run, 1)
    try:
        core.call_utility("pause_generation", "abort", True)
    except Exception as error:
        run.wait()
        pytest.skip(f"this vLLM has no such pause: {error}")
    for _ in range(3):
        (refused,) = engine_apart.generate([PROMPTS[0]], GREEDY, use_tqdm=False)
        assert refused.outputs[0].finish_reason == "error"
    seen = len(run.history)
    time.sleep(0.2)
    run.poll()
    assert len(run.history) <= seen + 1, "the job rests"
    core.call_utility("resume_scheduler")
    run.wait()
    assert Trajectory.of(engine_apart, run) == Trajectory.of(engine_apart, unbroken)
    assert engine_apart.generate([PROMPTS[0]], GREEDY, use_tqdm=False)[0].outputs[0].finish_reason == "length"
