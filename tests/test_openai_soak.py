"""Half an hour of a server's life: jobs created, paused, cancelled and finished under load, adapters that come and go,
and a job without end that gets rows and feedback, and whose versions are promoted and rolled back.

Between rounds the server is idle and is measured: what it holds then must not grow. ZO_SOAK_MINUTES shortens it.
"""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from openai import OpenAI

from tests.engines import Engines, reviews
from tests.openai_server import FLAGS, METHOD, SENTIMENT, Server, create, jsonl, upload_reviews, wait_for

MINUTES = float(os.environ.get("ZO_SOAK_MINUTES", "30"))
WARM_UP = 0.3
"""Share of the rounds in which allocators and caches may still grow."""
MIB = 1 << 20
ALLOWED = {"front MiB": 12.0, "engine MiB": 12.0, "handles": 4.0}
"""What the whole measured time may add beyond noise: jobs leave their records (steps are on disk), some KB each."""
JOBS_A_ROUND = 5
SETTLE_S, SETTLED_WITHIN_S = 2.0, 20.0
MAX_MODELS = 1 + 4 + 3 + 2
"""The base, and of the job without end: its newest versions, those that are live or were, two names that mean one."""
ROUND_S = 600.0
"""Until the jobs of a round have ended, under load on a busy machine."""


class Load(threading.Thread):
    """Completions on whatever is served, one after another; an answer that is an error ends the test."""

    def __init__(self, client: OpenAI) -> None:
        super().__init__(daemon=True)
        self.client, self.stop, self.answered = client, threading.Event(), 0
        self.error: Exception | None = None

    def run(self) -> None:
        rng = random.Random(id(self))
        while not self.stop.is_set():
            try:
                name = rng.choice([model.id for model in self.client.models.list()])
                self.client.completions.create(model=name, prompt="a warm story", max_tokens=rng.randint(1, 24))
                self.answered += 1
            except openai.NotFoundError:
                pass  # unloaded since it was listed
            except openai.OpenAIError as error:
                self.error = error
                return


def feed(client: OpenAI, server: Server, job_id: str, rng: random.Random) -> None:
    """Rows, feedback, a promotion and a rollback for a job without end."""
    path, live = f"/v1/fine_tuning/jobs/{job_id}", f"live:{job_id}"
    with server.http() as http:
        http.post(f"{path}/examples", content=jsonl(reviews(8, seed=rng.getrandbits(31)))).raise_for_status()
        for _ in range(3):
            answer = client.completions.create(model=live, prompt="a warm story It was", max_tokens=1)
            said = rng.choice([{"label": rng.randint(0, 1)}, {"score": rng.random()}])
            given = http.post("/v1/fine_tuning/feedback", json={"completion_id": answer.id, **said})
            given.raise_for_status()
        http.delete(f"/v1/fine_tuning/feedback/{given.json()['id']}").raise_for_status()
        for _ in range(2):
            versions = http.get(f"{path}/versions").json()
            step = rng.choice(versions["data"])["step"]
            # A conflict: it was pruned since, or nothing was live before.
            assert http.post(f"{path}/versions/{step}/promote").status_code in (200, 404, 409)
        assert http.post(f"{path}/versions/{step}/rollback").status_code in (200, 404, 409)


def endless(client: OpenAI, data: str) -> str:
    """A job without end, once a version of it is live."""
    hyperparameters = {**METHOD, "publish_interval": 20, "keep_versions": 4, "buffer_rows": 64, "batch_size": 8}
    of_method = {"continual": True, "feedback": {"retention_days": 1}, "live": {"canary": 0.1}}
    zeroth: Any = {"hyperparameters": hyperparameters, "objective": SENTIMENT, **of_method}
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=data, method={"type": "zeroth_order", "zeroth_order": zeroth}
    )
    while f"live:{job.id}" not in [model.id for model in client.models.list()]:
        time.sleep(0.2)
    return job.id


def one_round(client: OpenAI, server: Server, data: str, rng: random.Random, learner: str) -> list[str]:
    """Some jobs with some fate each; returns the statuses they ended with."""
    jobs = [
        create(client, data, hyperparameters={"steps": rng.randint(30, 120), "eps": 1e-2}) for _ in range(JOBS_A_ROUND)
    ]
    for job in jobs:
        fate = rng.random()
        try:
            if fate < 0.3:
                client.fine_tuning.jobs.cancel(job.id)
            elif fate < 0.6:
                client.fine_tuning.jobs.pause(job.id)
                wait_for(client, job.id, "paused", "succeeded", timeout_s=ROUND_S)
                client.fine_tuning.jobs.resume(job.id)
        except openai.ConflictError:
            pass  # it was not as far yet, or further already
    feed(client, server, learner, rng)
    ended = [wait_for(client, job.id, "succeeded", "cancelled", timeout_s=ROUND_S).status for job in jobs]
    for model in client.models.list():
        if model.id.startswith("ft:") and learner.removeprefix("ftjob-") not in model.id:
            server.http().delete(f"/v1/models/{model.id}?delete_files=true").raise_for_status()
    return ended


def measure(server: Server) -> dict[str, float]:
    front, engine = psutil.Process(server.process.pid), server.engine
    metrics = dict(
        line.rsplit(" ", 1) for line in server.http().get("/metrics").text.splitlines() if not line.startswith("#")
    )
    of = {name.partition("{")[0] if "vllm:" in name else name: float(value) for name, value in metrics.items()}
    return {
        "front MiB": front.memory_info().rss / MIB,
        "engine MiB": engine.memory_info().rss / MIB,
        "handles": float(front.num_fds() + engine.num_fds()),
        "slots": of['vllm_zo:slots{state="in_use"}'],
        "kv": of["vllm:kv_cache_usage_perc"],
        "models": float(len(server.client().models.list().data)),
    }


def settled(server: Server) -> dict[str, float]:
    """The numbers once the last versions of the paused job are published, and old ones removed. They come after its
    status."""
    end = time.monotonic() + SETTLED_WITHIN_S
    while True:
        time.sleep(SETTLE_S)
        found = measure(server)
        if found["models"] <= MAX_MODELS or time.monotonic() > end:
            return found


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 2 * ROUND_S)
def test_a_server_stays_as_it_was(engines: Engines, tmp_path: Path) -> None:
    flags = (*FLAGS, "--zo-slowdown", "0")  # with the default the load would leave the jobs little to do
    server = Server(str(engines.model("opt")), tmp_path / "state", *flags).wait_until_ready()
    try:
        found, ended, answered = soak(server)
    finally:
        server.kill()
    print(f"{len(found)} rounds, {len(ended)} jobs, {answered} answers; first {found[0]}, last {found[-1]}")
    assert {"succeeded", "cancelled"} <= set(ended)
    assert all(m["slots"] == 0 and m["models"] <= MAX_MODELS for m in found), "slots and adapters are given back"
    assert all(m["kv"] == 0 for m in found), "and KV blocks"
    later = found[int(len(found) * WARM_UP) :]
    assert len(later) >= 3, "too few rounds to judge: give it more minutes"
    grown = {name: trend([m[name] for m in later]) for name in ALLOWED}
    for name, (growth, noise) in grown.items():
        print(f"{name}: grew by {growth:.1f} (noise {noise:.1f}), from round 1 on {[round(m[name], 1) for m in found]}")
    assert all(growth < ALLOWED[name] + 2 * noise for name, (growth, noise) in grown.items()), grown


def trend(values: list[float]) -> tuple[float, float]:
    """How much the line through `values` rises from the first to the last, and their deviation from it."""
    rounds = np.arange(len(values))
    slope, start = np.polyfit(rounds, values, 1)
    return float(slope) * (len(values) - 1), float(np.std(values - (slope * rounds + start)))


def soak(server: Server) -> tuple[list[dict[str, float]], list[str], int]:
    client, rng = server.client(), random.Random(0)
    data = upload_reviews(client, 24)
    learner = endless(client, data)
    end = time.monotonic() + 60 * MINUTES
    found: list[dict[str, float]] = []
    ended: list[str] = []
    answered = 0
    while time.monotonic() < end:
        loads: list[Any] = [Load(server.client()) for _ in range(3)]
        for load in loads:
            load.start()
        ended += one_round(client, server, data, rng, learner)
        for load in loads:
            load.stop.set()
            load.join(60)
            assert load.error is None, load.error
            answered += load.answered
        client.fine_tuning.jobs.pause(learner)
        wait_for(client, learner, "paused")
        found.append(settled(server))
        client.fine_tuning.jobs.resume(learner)
    return found, ended, answered
