"""Two real engines of a tiny model, one thread each: one log whatever happens to them, and nothing left behind."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from vllm import SamplingParams

from tests.children import ENDLESS, Child
from tests.engines import SENTIMENT, Engines, reviews
from tests.test_durability import interrupted
from tests.test_log_path import assert_the_reference_takes_the_steps_of
from tests.test_multiprocess import PLAYED, ended, wait_until
from tests.trajectories import JOB, LOZO, SPACES, STEPS, cut_copy, steps_of, train
from vllm_zo import Cluster, ConfigError, JobError, Reward, Rollout
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.format import StepRecord
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.checkpoint.snapshot import load_snapshot
from vllm_zo.cluster import leases
from vllm_zo.cluster.protocol import Commit
from vllm_zo.commands import ApplyRecord
from vllm_zo.entrypoints.cluster import devices
from vllm_zo.entrypoints.cluster.local import MAX_RESTARTS
from vllm_zo.jobs.directory import JobDir

ENGINE: dict[str, Any] = {
    "max_model_len": 128, "dtype": "float32", "block_size": 32, "num_gpu_blocks_override": 1024,
}  # fmt: skip
GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


def one_core_each(count: int) -> list[list[int]]:
    """The same core for two engines where this process has only one: slow, and right."""
    cores = sorted(os.sched_getaffinity(0))
    return [[cores[index % len(cores)]] for index in range(count)]


@pytest.fixture(scope="module")
def cluster(engines: Engines) -> Iterator[Cluster]:
    with Cluster(str(engines.model("opt")), 2, devices=one_core_each(2), **ENGINE) as made:
        processes = [psutil.Process(engine.process.pid) for engine in made.engines]
        yield made
        processes += [psutil.Process(engine.process.pid) for engine in made.engines]
    assert all(ended(process) for process in processes), "no process outlives its cluster"


def first_only(cluster: Cluster) -> Cluster:
    """The cluster as it would be with one engine."""
    one, host = copy.copy(cluster), copy.copy(cluster._host)
    one._host, host.engines = host, cluster.engines[:1]  # type: ignore[misc]
    return one


def log_of(run: Any) -> bytes:
    return (run.directory / "seeds.log").read_bytes()


def test_one_engine_and_two_write_the_same_log_and_an_llm_takes_the_same_steps(
    engines: Engines, cluster: Cluster
) -> None:
    two = train(cluster)  # as many shards as engines
    expected = train(first_only(cluster), shards=2)
    assert log_of(two) == log_of(expected)
    assert [r["loss"] for r in two.history] == [r["loss"] for r in expected.history]
    # To rounding: another test may have made the engine of this process, with more threads. It grows with the steps.
    alone = [r["loss"] for r in train(engines.get(), shards=2).history]
    assert alone[:4] == pytest.approx([r["loss"] for r in two.history[:4]], abs=1e-3)
    assert {name: engine["shards"] > 0 for name, engine in two.engines.items()} == {"engine 0": True, "engine 1": True}
    assert log_of(train(cluster, seed=6)) != log_of(expected), "the comparison is not blind"


def test_evaluations_versions_and_completions_are_those_of_one_engine(engines: Engines, cluster: Cluster) -> None:
    options = {"shards": 3, "validation": reviews(12, seed=3), "eval_interval": 4, "checkpoint_interval": 4}
    run, one, alone = train(cluster, **options), train(first_only(cluster), **options), train(engines.get(), **options)
    assert log_of(run) == log_of(one)
    for mine, theirs, in_process in zip(run.evaluations, one.evaluations, alone.evaluations, strict=True):
        assert (mine["step"], mine["eval_loss"]) == (theirs["step"], theirs["eval_loss"])
        assert in_process["eval_loss"] == pytest.approx(mine["eval_loss"], abs=1e-2)
    log = read_seed_log(run.directory / "seeds.log")
    assert run.published == alone.published == [0, 4, 8, STEPS]
    for version in run.published:
        state = log.header.new_state()
        assert load_snapshot(JobDir(run.directory).version(version), state) == version
        assert torch.equal(state.acc_BN, rebuild_state(log, version).acc_BN)
    prompts = ["the story is dull", "a film of great charm"] * 2  # the first engine gets the first and third
    answers = [o.outputs[0].token_ids for o in cluster.generate(prompts, GREEDY, lora_request=run.lora_request)]
    expected = engines.get().generate(prompts, GREEDY, use_tqdm=False, lora_request=alone.lora_request)
    assert answers == [o.outputs[0].token_ids for o in expected]
    assert cluster.generate("the story is", GREEDY)[0].outputs[0].token_ids
    given_back = engines.get().evaluate(reviews(12, seed=3), run=alone)
    assert cluster.evaluate(reviews(12, seed=3), run=run) == pytest.approx(given_back, abs=1e-2)
    assert cluster.evaluate(reviews(12, seed=3), SENTIMENT)["loss"] == run.evaluations[0]["eval_loss"]


def test_a_run_goes_on_with_the_shards_that_it_had(cluster: Cluster, tmp_path: Path) -> None:
    whole = train(first_only(cluster), shards=3)
    directory = cut_copy(whole.directory, tmp_path / "cut", 4)
    resumed = train(cluster, resume_from=directory)
    assert log_of(resumed) == log_of(whole) and len(resumed.history) == STEPS - 4


def test_members_that_write_are_rewarded_where_they_are(engines: Engines, cluster: Cluster) -> None:
    reward = Reward("{sentence}", reward=letters_written, max_tokens=4, samples=2, shaping="zscore")
    options: dict[str, Any] = {"objective": reward, "steps": 3, "learning_rate": 1e-3, "shards": 2}
    run, one = train(cluster, **options), train(first_only(cluster), **options)
    assert log_of(run) == log_of(one) and [r["reward"] for r in run.history] == [r["reward"] for r in one.history]
    alone = train(engines.get(), **{**options, "steps": 1})
    assert alone.history[0]["reward"] == pytest.approx(run.history[0]["reward"], abs=0.5), "the same completions"


@pytest.mark.slow
def test_each_engine_plays_the_rollouts_of_its_own_probes_and_a_killed_one_costs_no_step(cluster: Cluster) -> None:
    rows = reviews(8, seed=1), reviews(3, seed=2)
    options: dict[str, Any] = {**PLAYED, "shards": 4}
    expected = first_only(cluster).finetune(*rows, **options)
    victim = cluster.engines[1]

    def kill(run: Any, record: dict[str, Any]) -> None:
        if record["step"] == 1 and victim.restarts == 0:
            os.kill(victim.process.pid, signal.SIGKILL)

    run = cluster.finetune(*rows, **options, callbacks=[kill])
    assert log_of(run) == log_of(expected) and any(record["coefficients"] != [0.0] for record in run.history)
    for mine, theirs in zip(run.history, expected.history, strict=True):
        assert mine["rewards"] == theirs["rewards"] and mine["turns"] == theirs["turns"] == 2
    assert run.metrics["reward"] == expected.metrics["reward"] and len(run.transcripts["newest"]["rollouts"]) == 3
    again = cluster.finetune(*rows, **options)
    assert log_of(again) == log_of(expected) and all(engine["shards"] > 0 for engine in again.engines.values())
    assert cluster.evaluate(rows[1], run=run)["reward"] == run.metrics["reward"]
    with pytest.raises(ConfigError, match="each engine of a cluster plays in a process of its own"):
        cluster.finetune(*rows, **{**options, "objective": Rollout(lambda client, model, row: 0.0)})
    with pytest.raises(JobError, match="failed: engine [01]: play='no_such_module:f' cannot be imported"):
        cluster.finetune(*rows, **{**options, "objective": Rollout("no_such_module:f")})
    assert train(cluster, steps=2).status == "succeeded", "the cluster goes on"


def letters_written(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def fails(completions: list[str], **columns: Any) -> list[float]:
    raise RuntimeError("the grader has a bug")


def test_the_error_of_an_engine_is_that_of_the_job_and_the_cluster_goes_on(cluster: Cluster) -> None:
    with pytest.raises(JobError, match="failed: engine [01]: .*the grader has a bug"):
        train(cluster, objective=Reward("{sentence}", reward=fails, max_tokens=4))
    assert train(cluster, steps=2).status == "succeeded"


@pytest.mark.slow
def test_the_first_traceback_of_an_engine_is_in_the_error_of_the_job(cluster: Cluster) -> None:
    """Both engines get a step that is not the next one, which no coordinator sends; none is started again."""

    def confuse(run: Any, record: dict[str, Any]) -> None:
        if record["step"] == 3:
            for engine in cluster.engines:
                engine.restarts = MAX_RESTARTS
                wrong = ApplyRecord(run.job_id, StepRecord(77, 0.1, (0.0,), True))
                engine.send(Commit(cluster._host._latest.epoch, (wrong,)))  # type: ignore[attr-defined]

    try:
        with pytest.raises(JobError, match=r"(?s)no engine is left; engine [01] ended .*Traceback .*in _commit"):
            train(cluster, shards=2, callbacks=[confuse])
    finally:
        for engine in cluster.engines:
            engine.restarts = 0
    assert train(cluster, steps=2).status == "succeeded", "the engines are started again when they are needed"


def test_a_directory_that_cannot_be_written_is_named_before_any_work(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((ConfigError, JobError), match=f"{tmp_path}/file"):
        train(cluster, output_dir=str(tmp_path / "file" / "run"))


def test_an_engine_killed_with_signal_9_costs_no_step(cluster: Cluster) -> None:
    expected = train(first_only(cluster), shards=2)
    victim = cluster.engines[1]
    killed: list[int] = []

    def kill(run: Any, record: dict[str, Any]) -> None:
        if record["step"] == 4:
            killed.append(victim.process.pid)
            os.kill(victim.process.pid, signal.SIGKILL)

    run = train(cluster, shards=2, callbacks=[kill])
    assert killed and log_of(run) == log_of(expected)
    assert [record["step"] for record in run.history] == list(range(1, STEPS + 1))
    again = train(cluster, shards=2)
    assert log_of(again) == log_of(expected) and victim.process.pid != killed[0] and victim.up


class Freezer:
    """Stops an engine after some step and lets it go on after a later one, like a machine that swaps."""

    def __init__(self, engine: Any, after: int, until: int) -> None:
        self.engine, self.signals = engine, {after: signal.SIGSTOP, until: signal.SIGCONT}

    def __call__(self, run: Any, record: dict[str, Any]) -> None:
        if "loss" in record and (number := self.signals.get(record["step"])) is not None:
            self.engine.process.send_signal(number)


def test_a_frozen_engine_costs_no_step(cluster: Cluster) -> None:
    expected = train(first_only(cluster), shards=2)
    run = train(cluster, shards=2, callbacks=[Freezer(cluster.engines[1], 3, 8)])
    assert log_of(run) == log_of(expected)


def test_with_a_deadline_a_frozen_engine_costs_directions(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LATE_AT_LEAST_S", 1e9)  # else the other engine would do its work
    four = replace(LOZO, queries=4)
    freezer = Freezer(cluster.engines[1], 3, 5)
    run = train(cluster, method=four, shards=4, deadline=1.0, callbacks=[freezer])
    late = [record["late"] for record in run.history if "late" in record]
    assert late and set(late) <= {1, 2} and len(run.history) == STEPS
    zeros = [sum(value == 0 for value in record["coefficients"]) for record in run.history]
    assert [count for count in zeros if count] == late
    log = read_seed_log(run.directory / "seeds.log")
    state = log.header.new_state()
    assert load_snapshot(JobDir(run.directory).version(STEPS), state) == STEPS
    assert torch.equal(state.acc_BN, rebuild_state(log).acc_BN), "such a log replays as any other"


def test_ctrl_c_cancels_the_job_and_leaves_the_engines(cluster: Cluster) -> None:
    runs: list[Any] = []

    def interrupt(run: Any, record: dict[str, Any]) -> None:
        if record["step"] == 3:
            runs.append(run)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cluster, shards=2, callbacks=[interrupt])
    (run,) = runs
    assert run.status == "cancelled" and read_seed_log(run.directory / "seeds.log").num_steps >= 3
    resumed = train(cluster, resume_from=run.directory)
    assert log_of(resumed) == log_of(train(cluster, shards=2))


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_with_the_reason(cluster: Cluster, engines: Engines) -> None:
    model = str(engines.model("opt"))
    with pytest.raises(ConfigError, match="engines=0"):
        Cluster(model, 0)
    with pytest.raises(ConfigError, match="model='/no/such/model': no such directory"):
        Cluster("/no/such/model", 2)
    with pytest.raises(ConfigError, match="update_space='fold' on a cluster"):
        train(cluster, "fold")
    with pytest.raises(ConfigError, match="train, row 1: "):
        cluster.finetune([{"label": 1}], **JOB, **SPACES["bank"])
    with pytest.raises(ConfigError, match="engines=2: this process may use 1 cores; start fewer engines"):
        devices._equal_shares([7], 2, 1, "cores")


@pytest.mark.slow
def test_an_engine_that_does_not_start_tells_why_and_the_others_end(engines: Engines) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs=1 with zo_training: a pair of probes runs together"):
        Cluster(str(engines.model("opt")), 2, devices=one_core_each(2), max_num_seqs=1, **ENGINE)


def test_engines_share_the_cores_and_hear_nothing_of_a_launcher(monkeypatch: Any) -> None:
    for name in ("MASTER_ADDR", "RANK", "VLLM_DP_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setattr(devices, "is_cpu_build", lambda: True)
    monkeypatch.setattr(devices, "_cores", lambda: [0, 1, 2, 3, 8])
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    first, second = devices.environments(2, 1)
    assert first["VLLM_CPU_OMP_THREADS_BIND"] == "0,1" and second["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"
    assert first["OMP_NUM_THREADS"] == "2" and int(first["VLLM_CPU_KVCACHE_SPACE"]) >= 1
    assert not {"MASTER_ADDR", "RANK", "VLLM_DP_RANK", "WORLD_SIZE"} & first.keys()
    (ranks,) = devices.environments(1, 2, [[4, 5, 6, 7]])
    assert ranks["VLLM_CPU_OMP_THREADS_BIND"] == "4,6|5,7"
    monkeypatch.setattr(devices, "is_cpu_build", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in devices.environments(2, 2)] == ["2,3", "5,7"]
    with pytest.raises(ConfigError, match="expected 2 lists"):
        devices.environments(2, 1, [[0]])


# --- slow ------------------------------------------------------------------------------------------------------------


def first_steps(engines: Engines, count: int) -> tuple[Any, ...]:
    """The records of the first steps of the endless job, as one engine makes them."""
    run = interrupted(engines.get(), count, shards=2, **ENDLESS)
    run.cancel()
    return steps_of(run.directory)[:count]


@pytest.mark.slow
def test_an_engine_that_was_killed_comes_back_into_the_same_job(engines: Engines, cluster: Cluster) -> None:
    victim = cluster.engines[1]
    gone: list[bool] = []
    came_back: list[int] = []

    def kill_and_wait(run: Any, record: dict[str, Any]) -> None:
        if record["step"] == 4:
            os.kill(victim.process.pid, signal.SIGKILL)
        elif record["step"] > 4 and not came_back:
            time.sleep(0.02)  # few steps to repeat below
            here = run.engines[victim.name]
            gone.append(not here["ready"])
            if any(gone) and here["ready"] and here["shards"]:
                came_back.append(record["step"])
                run.stop()

    run = train(cluster, shards=2, **ENDLESS, callbacks=[kill_and_wait])
    assert came_back and run.status == "succeeded"
    records = steps_of(run.directory)
    assert records == first_steps(engines, len(records)) and len(run.history) == len(records)


@pytest.mark.slow
def test_engines_killed_at_twenty_random_instants_cost_no_step(engines: Engines) -> None:
    random_ = random.Random(0)
    kills: list[str] = []
    with Cluster(str(engines.model("opt")), 2, devices=one_core_each(2), **ENGINE) as cluster:
        expected = log_of(train(cluster, shards=2, steps=60))

        def kill(run: Any, record: dict[str, Any]) -> None:
            up = [engine for engine in cluster.engines if engine.up and engine.process.poll() is None]
            if len(up) == 2 and random_.random() < 0.05:
                victim = random_.choice(up)
                victim.restarts = 0  # a user's cluster gives up after three
                time.sleep(random_.uniform(0, 0.02))
                kills.append(victim.name)
                os.kill(victim.process.pid, signal.SIGKILL)

        while len(kills) < 20:
            run = train(cluster, shards=2, steps=60, callbacks=[kill])
            assert log_of(run) == expected and len(run.history) == 60, f"after {len(kills)} kills"
    assert set(kills) == {"engine 0", "engine 1"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_engines_end_with_their_driver(engines: Engines, tmp_path: Path, number: signal.Signals) -> None:
    child = Child("train_on_two_engines", str(engines.model("opt")), str(tmp_path / "run"))
    child.wait_for_steps(tmp_path / "run", 3)
    processes = [psutil.Process(pid) for pid in child.reports[0]["pids"]]
    processes += [grandchild for process in processes for grandchild in process.children(recursive=True)]
    for process in processes if number == signal.SIGINT else ():
        process.send_signal(number)  # the terminal sends it to all
    child.process.send_signal(number)
    wait_until(lambda: all(ended(process) for process in processes), 30)
    records = steps_of(tmp_path / "run")
    assert records == first_steps(engines, len(records))


@pytest.mark.slow
@pytest.mark.parametrize("ranks, stages", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_steps_depend_neither_on_ranks_nor_on_stages_nor_on_engines(
    engines: Engines, cluster: Cluster, ranks: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(ranks, pipeline stages, engines) in {1, 2}^3, each against the plain reference on `transformers`.

    Engines that are made alike write the same bytes. Others take the same steps to within rounding: two ranks add up
    their sums in another order. Two engines of two ranks in two stages are eight processes, on one core or two.
    """
    workers = ranks * stages
    monkeypatch.setattr(leases, "LATE_AT_LEAST_S", 1e9)  # else one engine may do the work of both, where a core is busy
    cores = [of_engine * workers for of_engine in one_core_each(2)]
    options = {**ENGINE, "tensor_parallel_size": ranks, "pipeline_parallel_size": stages}
    made = nullcontext(cluster) if workers == 1 else Cluster(str(engines.model("opt")), 2, devices=cores, **options)
    with made as members:
        one, two = (train(these, shards=2) for these in (first_only(members), members))
        assert log_of(one) == log_of(two)
        assert {name: engine["shards"] > 0 for name, engine in two.engines.items()} == dict.fromkeys(
            ("engine 0", "engine 1"), True
        )
    assert_the_reference_takes_the_steps_of(two, engines.model("opt"))


@pytest.mark.slow
def test_the_command_line_trains_a_recipe_on_two_engines(engines: Engines, tmp_path: Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in reviews(24, seed=1))
    (tmp_path / "train.jsonl").write_text(rows)
    recipe = {
        "model": str(engines.model("opt")), "train": str(tmp_path / "train.jsonl"), "steps": 5, "batch_size": 4,
        "objective": {"name": "classification", "template": "{sentence} It was", "options": [" terrible", " great"]},
        "engine": {"dtype": "float32", "max_model_len": 128, "num_gpu_blocks_override": 1024},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    program = "from vllm_zo.entrypoints.cli.app import main; main()"
    command = [sys.executable, "-c", program, "train", str(tmp_path / "recipe.yaml"), "--engines", "2"]
    command += ["--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if len(os.sched_getaffinity(0)) < 2:
        assert done.returncode == 2 and "engines=2: this process may use 1 cores" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 engines" in done.stderr and (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    assert read_seed_log(tmp_path / "run" / "seeds.log").header.job_config["shards"] == 2
    assert "recipe.yaml" in {path.name for path in (tmp_path / "run").iterdir()}, "which repeats the run"
