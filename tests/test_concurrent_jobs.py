"""Several jobs on one engine, and jobs that pause: each is the run it would have been alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.engines import SENTIMENT, Engines, client_of, reviews, scheduler_of, worker_of
from tests.test_seams import PROMPTS, RUN, job_in_progress, top_logprob
from tests.trajectories import base_weights
from vllm_zo import ConfigError, JobConfig, LoZO
from vllm_zo.commands import COMMANDS_ATTR
from vllm_zo.engine import job as job_module
from vllm_zo.entrypoints.llm.handle import FineTuneRun
from vllm_zo.entrypoints.llm.prepare import prepare_job

LOSS_TOLERANCE = 2e-5
TWO = {"concurrent_jobs": 2}


@pytest.fixture
def llm(engines: Engines) -> Iterator[Any]:
    engine = engines.get(zo_training=TWO)
    yield engine
    scheduler = scheduler_of(engine)
    for job_id in list(scheduler.zo.queue.unfinished):
        scheduler.zo.finish_early(job_id, cancel=True)
    while scheduler.has_requests():
        engine.llm_engine.step()
    assert not any(lane.group or lane.job for lane in scheduler.zo.queue.lanes)


def start(llm: Any, rows: list[dict[str, Any]], **options: Any) -> FineTuneRun:
    """`finetune` without waiting: in process the test steps the engine."""
    validation = options.pop("validation", None)
    settings = {"objective": SENTIMENT, "batch_size": 4, **options}
    job = prepare_job(llm.llm_engine, rows, validation, None, JobConfig.from_options(settings))
    run = FineTuneRun(client_of(llm), job.directory, job.config, job.model)
    client_of(llm).call("zo_start", str(job.directory))
    return run


def step(llm: Any, count: int) -> None:
    for _ in range(count):
        llm.llm_engine.step()


def losses(run: FineTuneRun) -> list[float]:
    return [record["loss"] for record in run.history]


def test_two_jobs_together_are_the_runs_they_are_alone(llm: Any) -> None:
    """Own slots, ranks, seeds and data each; beside each other only GEMM rounding may differ."""
    settings: list[dict[str, Any]] = [
        {"method": LoZO(rank=2, interval=3, eps=2e-2), "learning_rate": 1e-3, "steps": 12, "seed": 1},
        {"method": LoZO(rank=4, interval=5, eps=2e-2), "learning_rate": 5e-4, "steps": 9, "seed": 2},
    ]
    data = [reviews(16), reviews(12, seed=3)]
    alone = [llm.finetune(rows, **RUN, **options) for rows, options in zip(data, settings, strict=True)]
    together = [start(llm, rows, **options) for rows, options in zip(data, settings, strict=True)]
    both_running = 0
    while scheduler_of(llm).zo.has_work():
        step(llm, 1)
        for run in together:
            run.poll()
        both_running += all(run.status == "running" for run in together)
    assert both_running > 5
    for a, b in zip(alone, together, strict=True):
        assert b.status == "succeeded" and losses(b) == pytest.approx(losses(a), abs=LOSS_TOLERANCE)


def test_members_of_two_jobs_run_in_one_engine_step(llm: Any) -> None:
    start(llm, reviews(16), steps=50)
    start(llm, reviews(16), steps=50, seed=1)
    step(llm, 3)
    output = scheduler_of(llm).schedule()
    members = getattr(output, COMMANDS_ATTR).members
    assert len({member.group_id for member in members}) == 2
    owners = worker_of(llm).zo.pool._owner
    assert len(owners) == 4
    model_output = llm.llm_engine.engine_core.engine_core.model_executor.execute_model(output)
    scheduler_of(llm).update_from_output(output, model_output)
    assert len({owner for owner in owners if owner}) == 2, "each job has slots of its own"


def test_a_small_budget_is_shared_evenly(engines: Engines) -> None:
    """One pair fits a step: the jobs take turns, and after many steps both have been given as much."""
    llm = engines.get(zo_training={**TWO, "token_budget": 60}, max_num_batched_tokens=64, max_num_seqs=8)
    runs = [start(llm, reviews(16), steps=300, seed=seed, batch_size=b) for seed, b in enumerate((2, 8))]
    step(llm, 80)
    lanes = scheduler_of(llm).zo.queue.lanes
    given = [lane.tokens for lane in lanes]
    assert min(given) > 500 and max(given) - min(given) <= 64
    for run in runs:
        run.cancel()


def test_a_third_job_waits_for_a_lane(llm: Any) -> None:
    runs = [start(llm, reviews(16), steps=steps, seed=steps) for steps in (4, 40, 4)]
    step(llm, 2)
    for run in runs:
        run.poll()
    assert [run.status for run in runs] == ["running", "running", "queued"]
    runs[2].wait()
    runs[1].poll()
    assert runs[2].status == "succeeded" and runs[1].status == "running"


def test_a_paused_job_gives_its_lane_away_and_goes_on_as_if_nothing_had_happened(llm: Any) -> None:
    options: dict[str, Any] = {"steps": 12, "learning_rate": 1e-3, "method": LoZO(interval=4, eps=2e-2)}
    unbroken = llm.finetune(reviews(16), **RUN, **options)
    client = client_of(llm)
    run = start(llm, reviews(16), **options)
    step(llm, 5)
    client.call("zo_pause", run.job_id)
    while run.status != "paused":
        step(llm, 1)
        run.poll()
    seen = len(run.history)
    assert 0 < seen < 12
    lanes = scheduler_of(llm).zo.queue.lanes
    assert not any(lane.job for lane in lanes) and all(len(lane.slots.free) == 2 for lane in lanes)
    step(llm, 2)
    assert not scheduler_of(llm).has_requests(), "an engine with only a paused job must become idle"
    llm.finetune(reviews(16), steps=5, seed=9, learning_rate=1e-3, **RUN)  # another job uses the slots meanwhile
    run.poll()
    assert len(run.history) == seen
    client.call("zo_resume", run.job_id)
    run.wait()
    assert losses(run) == losses(unbroken)


def test_pausing_twice_resuming_early_and_cancelling_while_paused(llm: Any) -> None:
    client = client_of(llm)
    run = start(llm, reviews(16), steps=100)
    with pytest.raises(ConfigError, match=f"job {run.job_id} is queued, not paused"):
        client.call("zo_resume", run.job_id)
    client.call("zo_pause", run.job_id)  # a queued job rests at once
    run.poll()
    assert run.status == "paused"
    client.call("zo_resume", run.job_id)
    step(llm, 3)
    client.call("zo_pause", run.job_id)
    client.call("zo_pause", run.job_id)
    client.call("zo_resume", run.job_id)  # before its group is back
    step(llm, 3)
    run.poll()
    assert run.status == "running" and len(run.history) >= 3
    client.call("zo_pause", run.job_id)
    step(llm, 2)
    run.cancel()
    assert run.status == "cancelled" and run.job_id not in scheduler_of(llm).zo.queue.unfinished
    with pytest.raises(ConfigError, match="is cancelled: there is nothing to pause"):
        client.call("zo_pause", run.job_id)


def test_a_run_out_of_time_finishes_its_step_evaluates_and_publishes(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is the test's: it stands, until from some step on an engine step takes ten seconds."""
    now = 0.0
    monkeypatch.setattr(job_module, "time", SimpleNamespace(monotonic=lambda: now))
    options: dict[str, Any] = {
        "validation": reviews(6, seed=5), "steps": 100, "learning_rate": 1e-3, "method": LoZO(interval=4, eps=2e-2),
    }  # fmt: skip
    unbroken = llm.finetune(reviews(16), **RUN, **{**options, "steps": 5})
    run, client = start(llm, reviews(16), max_seconds=40, **options), client_of(llm)

    def wait_until(reached: Callable[[], bool], seconds: float) -> None:
        nonlocal now
        while not reached():
            now += seconds
            step(llm, 1)
            run.poll()

    wait_until(lambda: len(run.history) == 2, 0.0)
    client.call("zo_pause", run.job_id)
    wait_until(lambda: run.status == "paused", 0.0)
    now += 1000.0  # rest does not count
    seen = len(run.history)
    client.call("zo_resume", run.job_id)
    wait_until(lambda: run.status != "queued" and run.status != "paused", 0.0)
    wait_until(lambda: run.status == "succeeded", 10.0)
    assert seen < len(run.history) <= seen + 5 and run.evaluations[-1]["step"] == len(run.history)
    assert losses(run)[:5] == losses(unbroken)[: len(run.history)]
    assert max(scheduler_of(llm).zo.queue.get(run.job_id).versions.steps) == len(run.history)
    assert run.metrics["steps"] == len(run.history) and run.version_file.exists()


def test_a_run_out_of_time_from_the_start_still_evaluates(llm: Any) -> None:
    run = llm.finetune(reviews(16), reviews(6, seed=5), steps=10**6, max_seconds=1e-9, **RUN)
    assert run.status == "succeeded" and not run.history and run.evaluations[0]["step"] == 0


def statuses(*runs: FineTuneRun) -> list[str]:
    for run in runs:
        run.poll()
    return [str(run.status) for run in runs]


def test_a_fold_job_waits_for_its_turn_and_those_behind_it_for_the_base(llm: Any) -> None:
    first = start(llm, reviews(16), steps=100)
    options: dict[str, Any] = {"method": LoZO(interval=1, rank=2), "update_space": "fold", "learning_rate": 1e-2}
    fold = start(llm, reviews(16), steps=4, **options)
    behind = start(llm, reviews(16), steps=4)
    step(llm, 3)
    assert statuses(first, fold, behind) == ["running", "queued", "queued"], "there is a free lane, and it is kept"
    assert top_logprob(llm) < 0, "until its turn comes the engine serves"
    before = base_weights(llm)
    first.cancel()
    with pytest.raises(ConfigError, match=f"update_space='fold' in job {fold.job_id}: the base weights change"):
        llm.generate(PROMPTS, use_tqdm=False)
    fold.wait()
    assert any(not torch.equal(before[name], weight) for name, weight in base_weights(llm).items())
    assert statuses(behind) == ["queued"] and not scheduler_of(llm).has_requests()
    with pytest.raises(ConfigError, match=f"job {fold.job_id} .*restore_base"):
        llm.finetune(reviews(16), steps=4, **RUN)
    llm.restore_base(fold)
    behind.wait()
    assert all(torch.equal(before[name], weight) for name, weight in base_weights(llm).items())


def test_a_fold_job_begins_when_the_requests_are_answered_and_refuses_new_ones(llm: Any) -> None:
    from vllm import SamplingParams

    llm.llm_engine.add_request("asked before", PROMPTS[0], SamplingParams(max_tokens=6, ignore_eos=True))
    fold = start(llm, reviews(16), steps=3, method=LoZO(interval=1, rank=2), update_space="fold")
    answered = False
    while not answered:
        with pytest.raises(ConfigError, match="the engine answers no other requests"):
            llm.llm_engine.add_request("asked after", PROMPTS[0], SamplingParams(max_tokens=1))
        assert statuses(fold) == ["queued"]
        answered = any(output.finished for output in llm.llm_engine.step())
    fold.wait()
    llm.restore_base(fold)
    assert top_logprob(llm) < 0


def test_a_fold_job_that_has_begun_is_not_paused_and_one_that_waits_is(llm: Any) -> None:
    client = client_of(llm)
    fold = start(llm, reviews(16), steps=100, update_space="fold")
    other = start(llm, reviews(16), steps=100, update_space="fold")
    assert client.call("zo_pause", other.job_id) == "paused"
    step(llm, 3)
    with pytest.raises(ConfigError, match="has changed the base: let it end, or cancel it"):
        client.call("zo_pause", fold.job_id)
    other.cancel()
    assert statuses(fold, other) == ["running", "cancelled"]
    fold.cancel()
    llm.restore_base(fold)


def test_a_job_that_waits_holds_no_examples_and_one_whose_files_are_gone_fails_alone(llm: Any) -> None:
    runs = [start(llm, reviews(16), steps=30, seed=seed) for seed in range(4)]
    step(llm, 2)
    jobs = [scheduler_of(llm).zo.queue.jobs[run.job_id] for run in runs]
    assert [len(job.rows) for job in jobs] == [16, 16, 0, 0]
    (runs[2].directory / "train.jsonl").unlink()
    runs[0].cancel()
    runs[1].cancel()
    step(llm, 2)
    assert statuses(runs[2], runs[3]) == ["failed", "running"]
    runs[3].cancel()


def test_a_job_may_rest_from_the_beginning(llm: Any) -> None:
    job = prepare_job(llm.llm_engine, reviews(16), None, None, JobConfig(objective=SENTIMENT, batch_size=4, steps=3))
    run = FineTuneRun(client_of(llm), job.directory, job.config, job.model)
    client_of(llm).call("zo_start", str(job.directory), True)
    assert not scheduler_of(llm).has_requests() and statuses(run) == ["paused"]
    client_of(llm).call("zo_resume", run.job_id)
    run.wait()
    assert len(run.history) == 3


def test_every_published_version_can_be_served_from_memory_or_from_its_file(llm: Any) -> None:
    """More versions than stay in memory; each answers what it answered when it was new."""
    from vllm.lora.request import LoRARequest

    answers = []

    def ask(version: int, name: str) -> float:
        request = LoRARequest(f"{name}-{version}", 7000 + 100 * len(answers) + version, f"zo://{run.job_id}/{version}")
        return top_logprob(llm, lora_request=request)

    run = llm.finetune(
        reviews(16), steps=12, publish_interval=2, learning_rate=2e-2, method=LoZO(interval=3, eps=1e-2), **RUN
    )
    versions = [2, 4, 6, 8, 10, 12]
    run.poll()
    assert run._summary["published"] == versions
    store = worker_of(llm).zo.versions
    resident = {version for job_id, version in store._resident if job_id == run.job_id}
    assert resident == {6, 8, 10, 12}, "the latest four stay"
    for version in versions:
        answers.append(ask(version, "first"))
    assert len({round(x, 4) for x in answers}) == len(versions)
    again = [ask(version, "again") for version in versions]
    assert again == pytest.approx(answers, abs=1e-5)
    assert run.lora_request.lora_path.endswith("/12")


def test_a_version_that_nobody_published_is_refused_and_the_engine_lives(llm: Any) -> None:
    from vllm.lora.request import LoRARequest

    with pytest.raises(ConfigError, match="zo://nobody/3 is not published on this engine"):
        llm.generate(PROMPTS, use_tqdm=False, lora_request=LoRARequest("nobody", 4711, "zo://nobody/3"))
    assert top_logprob(llm) < 0


def test_stats_tell_where_every_job_stands(llm: Any) -> None:
    client = client_of(llm)
    before = client.call("zo_stats")["tokens"]
    top_logprob(llm)
    with job_in_progress(llm) as run:
        step(llm, 6)
        stats = client.call("zo_stats")
    assert stats["slots"]["total"] == 4 and stats["slots"]["in_use"] == 2
    job = stats["jobs"][run.job_id]
    assert job["status"] == "running" and job["slots"] == 2 and 0 < job["step"] <= job["steps"] == 200
    assert job["steps_per_second"] > 0 and job["group_latency_s"] > 0 and job["loss"] > 0
    assert stats["tokens"]["training"] - before["training"] >= job["tokens"] > 0
    assert stats["tokens"]["serving"] > before["serving"]


def test_the_records_of_an_ended_run_are_read_from_disk(llm: Any) -> None:
    run = llm.finetune(reviews(16), reviews(6, seed=2), steps=7, eval_interval=3, **RUN)
    recorder = scheduler_of(llm).zo.queue.jobs[run.job_id].recorder
    assert not recorder._records, "an engine lives longer than its jobs"
    answer = client_of(llm).call("zo_status", run.job_id, 0)
    assert answer["next"] == len(answer["records"]) == 7 + 4
    assert [r for r in answer["records"] if "loss" in r] == run.history
    assert client_of(llm).call("zo_status", run.job_id, 9)["records"] == answer["records"][9:]


def test_a_job_that_has_ended_can_be_dropped_and_its_files_stay(llm: Any) -> None:
    call = client_of(llm).call
    run = llm.finetune(reviews(16), steps=3, **RUN)
    llm.generate(["a warm story"], lora_request=run.lora_request, use_tqdm=False)
    call("zo_drop", run.job_id)
    with pytest.raises(ConfigError, match="is unknown"):
        call("zo_status", run.job_id, 0)
    with pytest.raises(ConfigError, match="is not published on this engine"):
        llm.generate(["another story"], lora_request=run.lora_request, use_tqdm=False)
    llm.generate(["a third"], use_tqdm=False)  # a step, with which the worker gets the command
    assert run.job_id not in {job_id for job_id, _ in worker_of(llm).zo.versions._versions}
    assert run.directory.joinpath("seeds.log").exists() and run.version_file.exists()


def test_a_job_that_is_dropped_keeps_what_waiting_requests_name(llm: Any) -> None:
    run = llm.finetune(reviews(16), steps=3, **RUN)
    engine, versions = llm.llm_engine, worker_of(llm).zo.versions
    engine.add_request("waits", "a warm story", SamplingParams(max_tokens=4), lora_request=run.lora_request)
    client_of(llm).call("zo_drop", run.job_id)
    answered = []
    while engine.has_unfinished_requests():
        answered += [output.request_id for output in engine.step() if output.finished]
    assert answered == ["waits"]
    llm.generate(["another story"], use_tqdm=False)
    assert run.job_id not in {job_id for job_id, _ in versions._versions}


def test_unknown_engine_options_name_the_field() -> None:
    from vllm_zo import ZOTrainingConfig

    with pytest.raises(ConfigError, match=r"zo_training\.concurrent_jobs=0: expected an integer >= 1"):
        ZOTrainingConfig(concurrent_jobs=0)
    with pytest.raises(ConfigError, match="publish_interval=0: expected an integer >= 1"):
        JobConfig(objective=SENTIMENT, publish_interval=0)
