"""`vllm-zo serve --data-parallel-size 2`: both engines serve, both train, whatever happens to the server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.engines import Engines
from tests.openai_server import Server, create, upload_reviews, wait_for
from tests.test_multiprocess import ended
from tests.trajectories import steps_of

pytestmark = pytest.mark.slow
PROMPT = "a warm and clever story It was"
ENDLESS = {"steps": 100_000, "publish_interval": 10, "divergence_factor": None}


@pytest.fixture(scope="module")
def place(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return str(engines.model("opt")), tmp_path_factory.mktemp("parallel") / "state"


def start(place: tuple[str, Path]) -> Server:
    cores = sorted(os.sched_getaffinity(0))
    bind = f"{cores[0]}|{cores[-1]}"  # one core twice where this process has only one: slow, and right
    flags = ("--data-parallel-size", "2", "--num-gpu-blocks-override", "512")
    return Server(*place, *flags, VLLM_CPU_OMP_THREADS_BIND=bind, VLLM_CPU_KVCACHE_SPACE="1").wait_until_ready(600)


@pytest.fixture(scope="module")
def server(place: tuple[str, Path]) -> Iterator[Server]:
    made = start(place)
    yield made
    if made.process.poll() is None:
        made.kill()


def answers(client: OpenAI, model: str) -> list[list[float]]:
    """Log-probabilities of the greedy answer, from each engine."""
    found = []
    for rank in ("0", "1"):
        choice = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=1,
            extra_headers={"X-data-parallel-rank": rank},
        ).choices[0]  # fmt: skip
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        found.append([float(value or 0.0) for value in choice.logprobs.token_logprobs])
    return found


def shards(server: Server, job_id: str) -> dict[str, float]:
    text = server.http().get("/metrics").text
    found = re.findall(rf'vllm_zo:job_shards_total{{engine="(engine \d)",job="{job_id}"}} ([\d.]+)', text)
    return {name: float(count) for name, count in found}


def test_jobs_train_on_both_engines_and_both_serve_alike(server: Server, place: tuple[str, Path]) -> None:
    client = server.client()
    data, validation = upload_reviews(client, 24), upload_reviews(client, 8, seed=2)
    running = create(client, data, hyperparameters=ENDLESS)
    wait_for(client, running.id, "running", step=20)
    both = answers(client, f"job:{running.id}")
    assert len(both) == 2
    counts = shards(server, running.id)
    assert set(counts) == {"engine 0", "engine 1"} and min(counts.values()) > 0
    newest = client.fine_tuning.jobs.checkpoints.list(running.id).data[0].fine_tuned_model_checkpoint
    first, second = answers(client, newest)
    assert first == pytest.approx(second, abs=1e-4)
    assert client.fine_tuning.jobs.cancel(running.id).status == "cancelled"

    job = create(client, data, validation_file=validation, hyperparameters={"steps": 20, "eval_interval": 10})
    job = wait_for(client, job.id, "succeeded")
    base = answers(client, "tiny")
    first, second = answers(client, job.fine_tuned_model)
    assert first == pytest.approx(second, abs=1e-4) and first != pytest.approx(base[0], abs=1e-3)
    assert [c.step_number for c in client.fine_tuning.jobs.checkpoints.list(job.id)] == [20, 15, 10, 5]


def test_what_one_engine_must_do_is_refused(server: Server) -> None:
    client = server.client()
    data = upload_reviews(client, 8)
    with pytest.raises(openai.BadRequestError, match="2 engines; start one with --data-parallel-size 1"):
        create(client, data, hyperparameters={"update_space": "fold", "bases": None})


def test_a_job_that_was_paused_and_whose_server_was_killed_takes_the_same_steps(
    server: Server, place: tuple[str, Path]
) -> None:
    client = server.client()
    data = upload_reviews(client, 24)
    options: dict[str, Any] = {"seed": 3, "hyperparameters": {"steps": 60, "divergence_factor": None}}
    undisturbed = wait_for(client, create(client, data, **options).id, "succeeded")
    long: dict[str, Any] = {"seed": 3, "hyperparameters": {**ENDLESS, "learning_rate": 1e-4}}
    job, other = (create(client, data, **long) for _ in range(2))
    wait_for(client, job.id, "running", step=5)
    assert client.fine_tuning.jobs.pause(job.id).status in ("pausing", "paused")
    wait_for(client, job.id, "paused")
    wait_for(client, other.id, "running", step=5)  # it has the lane now
    client.fine_tuning.jobs.resume(job.id)
    client.fine_tuning.jobs.cancel(other.id)
    step = (wait_for(client, job.id, "running").model_extra or {})["step"]
    wait_for(client, job.id, "running", step=step + 5)

    processes = server.engine_processes
    server.kill()
    again = start(place)
    try:
        client = again.client()
        wait_for(client, job.id, "running", step=step + 20)
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        records = steps_of(place[1] / "jobs" / job.id)
        assert [record.step for record in records] == list(range(len(records)))
        rest = steps_of(place[1] / "jobs" / other.id)
        assert records[: len(rest)] == rest[: len(records)], "the same job, once disturbed and once not"
        assert wait_for(client, undisturbed.id, "succeeded").fine_tuned_model in {m.id for m in client.models.list()}
        processes += again.engine_processes
        assert again.stop() == 0
        assert all(ended(process) for process in processes), "no process outlives the server"
    finally:
        if again.process.poll() is None:
            again.kill()
