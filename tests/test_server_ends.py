"""The ends of the real server: it is killed, asked to stop, or loses its engine, and what it was told is kept.

SIGTERM ends it within 10 s in every state, and nothing of it is left. Most of these tests take away the server that
other files share, and come last where tests run in several processes (tests/scheduling.py): a start takes the better
part of a minute.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file

from tests.engines import Engines
from tests.openai_server import FLAGS, KEY, START_S, Server, Servers, create, upload_reviews, wait_for
from tests.test_hostile import GRADERS, python_grader, reward_job
from tests.test_openai_server import LONG, answer, differs
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.entrypoints.server.state.store import Store

END_BOUND_S = 10.0
"""Until the process has ended; its children follow at once."""


def test_killed_at_any_moment_it_goes_on_where_it_was(servers: Servers) -> None:
    client, state_dir = servers.running().client(), servers.state_dir
    data = upload_reviews(client, 24)
    # At METHOD's learning rate rounding grows by a factor of ten in a few steps: two runs would part by themselves.
    hyperparameters = {"steps": 200, "publish_interval": 25, "checkpoint_interval": 30, "learning_rate": 1e-3}
    options: Any = {"seed": 11, "hyperparameters": hyperparameters}
    done = wait_for(client, create(client, data, hyperparameters={"steps": 4}).id, "succeeded")
    answered = answer(client, done.fine_tuned_model)
    reference = wait_for(client, create(client, data, **options).id, "succeeded")
    unbroken = read_seed_log(state_dir / "jobs" / reference.id / "seeds.log").records
    endless: Any = {"hyperparameters": {"steps": LONG, "divergence_factor": None}}
    paused = create(client, data, **endless)
    wait_for(client, paused.id, "running", step=1)
    client.fine_tuning.jobs.pause(paused.id)
    wait_for(client, paused.id, "paused")
    running = create(client, data, **options)
    beside = create(client, data, **endless)
    queued = create(client, data, hyperparameters={"steps": 5})
    wait_for(client, running.id, "running", step=35)
    known = {job.id: job.status for job in client.fine_tuning.jobs.list(limit=100)}
    events = [event.id for event in client.fine_tuning.jobs.list_events(running.id, limit=1000)]
    servers.running().kill()

    client = servers.running().client()
    now = {job.id: job.status for job in client.fine_tuning.jobs.list(limit=100)}
    assert set(now) == set(known), "everything is listed"
    ended = ("succeeded", "failed", "cancelled")
    assert all(now[job] == status for job, status in known.items() if status in ended)
    # Not "are running": by now a short job may have gone on to its end.
    assert now[paused.id] == "paused"
    assert not {now[running.id], now[beside.id], now[queued.id]} & {"failed", "cancelled"}
    assert not differs(answer(client, done.fine_tuned_model), answered), "what was served is served"
    client.fine_tuning.jobs.cancel(beside.id)
    finished = wait_for(client, running.id, "succeeded")
    log = read_seed_log(state_dir / "jobs" / running.id / "seeds.log")
    assert [r.step for r in log.records] == list(range(200))
    assert finished.fine_tuned_model is not None
    adapter = state_dir / "adapters" / running.id / "step-200" / "adapter_model.safetensors"
    assert load_file(adapter), "exported"
    told = [event.id for event in client.fine_tuning.jobs.list_events(running.id, limit=1000)]
    assert told[-len(events) :] == events, "nothing that was told is taken back"
    steps = [
        e.data["step"]  # type: ignore[index]
        for e in client.fine_tuning.jobs.list_events(running.id, limit=1000)
        if e.type == "metrics"
    ]
    assert steps == list(range(200, 0, -1)), "each step is told once"
    assert any("goes on from step" in e.message for e in client.fine_tuning.jobs.list_events(running.id, limit=1000))
    wait_for(client, queued.id, "succeeded")
    # Another job ran beside this one, so that losses may differ by rounding: the first steps by nothing else.
    for ours, theirs in zip(log.records[:100], unbroken[:100], strict=True):
        assert ours.coefficients == pytest.approx(theirs.coefficients, rel=1e-2, abs=1e-2)
    client.fine_tuning.jobs.resume(paused.id)
    wait_for(client, paused.id, "running", step=3)
    client.fine_tuning.jobs.cancel(paused.id)


def test_asked_to_stop_it_ends_in_time_whatever_its_graders_do_and_leaves_its_jobs_to_go_on(servers: Servers) -> None:
    server = servers.running()
    client = server.client()
    job = create(
        client,
        upload_reviews(client, 24),
        hyperparameters={"steps": LONG, "divergence_factor": None, "publish_interval": 20},
    )
    wait_for(client, job.id, "running", step=50)
    rewarded = reward_job(client, python_grader("return 1.0"), [{"prompt": "It was"}] * 16)
    wait_for(client, rewarded, "running", step=1)
    endless = {"grader": {"type": "python", "name": "p", "source": "while True: pass"}, "model_sample": "x"}

    def ask() -> None:
        with pytest.raises(httpx.TransportError):
            server.http().post(f"{GRADERS}/run", json=endless)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    ends_in_time(server)
    for thread in threads:
        thread.join()
    store = Store(servers.state_dir / "server.db")
    for record in (store.job(job.id), store.job(rewarded)):
        assert record.status == "running" and record.error is None, "not failed"
    store.close()


def test_a_crash_of_the_engine_fails_its_jobs_with_the_reason(servers: Servers) -> None:
    server = servers.running()
    client = server.client()
    rewarded, job = (job for job in client.fine_tuning.jobs.list(limit=100) if job.status in ("queued", "running"))
    client.fine_tuning.jobs.cancel(rewarded.id)
    wait_for(client, job.id, "running", step=60)
    while not client.fine_tuning.jobs.checkpoints.list(job.id).data:  # it follows the steps
        time.sleep(0.1)
    server.engine.kill()
    deadline = time.monotonic() + 30
    while server.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    store = Store(servers.state_dir / "server.db")
    record = store.job(job.id)
    store.close()
    assert record.status == "failed" and record.error is not None, server.tail()
    assert record.error["code"] == "engine_died"
    assert record.error["message"].startswith("The engine process died. Its last checkpoint is ft:tiny:vllm-zo:")


# --- servers of their own ---------------------------------------------------------------------------------------------


def has_child(server: Server, title: str) -> bool:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return any(title in " ".join(child.cmdline()) for child in children)


MOMENTS: dict[str, Callable[[Server], bool]] = {
    "imports": lambda server: time.time() - psutil.Process(server.process.pid).create_time() > 2,
    "engine": lambda server: has_child(server, "EngineCore"),
    "worker": lambda server: has_child(server, "VLLM::Worker"),
}
"""When the signal comes, while the server still starts."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "plain"),
    [*((moment, False) for moment in MOMENTS), ("worker", True)],
    ids=[*MOMENTS, "plain vllm serve"],
)
def test_while_the_model_is_loading(engines: Engines, tmp_path: Path, moment: str, plain: bool) -> None:
    # A worker has a process of its own only where its threads are bound.
    bound = {"VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0)))} if moment == "worker" else {}
    server = Server(str(engines.model("opt")), tmp_path / "state", *FLAGS, plain=plain, **bound)
    try:
        deadline = time.monotonic() + START_S
        while not MOMENTS[moment](server):
            assert server.process.poll() is None and time.monotonic() < deadline, server.tail()
            time.sleep(0.05)
        ends_in_time(server)
    finally:
        if server.process.poll() is None:
            server.kill()


@pytest.mark.slow
def test_amid_an_upload_with_jobs_that_run_wait_and_are_watched(engines: Engines, tmp_path: Path) -> None:
    server = Server(str(engines.model("opt")), tmp_path / "state", *FLAGS).wait_until_ready()
    try:
        client = server.client()
        data = upload_reviews(client)
        endless: Any = {"steps": 100_000, "divergence_factor": None}
        running, *_, queued = [create(client, data, hyperparameters=endless) for _ in range(3)]
        wait_for(client, running.id, "running", step=1)
        wait_for(client, queued.id, "queued")
        with half_an_upload(server):
            watching = threading.Thread(target=watch, args=(server, running.id), daemon=True)
            watching.start()
            asking = threading.Thread(target=ask_for_much, args=(server,), daemon=True)
            asking.start()
            time.sleep(1.0)
            ends_in_time(server)
        watching.join(5)
        asking.join(5)
        assert not watching.is_alive() and not asking.is_alive()
    finally:
        if server.process.poll() is None:
            server.kill()


def ends_in_time(server: Server) -> None:
    children = psutil.Process(server.process.pid).children(recursive=True)
    started = time.monotonic()
    server.process.terminate()
    server.process.wait(60)
    assert time.monotonic() - started < END_BOUND_S, server.tail()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, "engine and worker end with the server"


def half_an_upload(server: Server) -> socket.socket:
    """A connection on which half of a file has come."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    lines = [
        "POST /v1/files HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}",
        "Content-Type: multipart/form-data; boundary=cut", f"Content-Length: {8 << 20}", "", "--cut",
        'Content-Disposition: form-data; name="file"; filename="train.jsonl"', "", "",
    ]  # fmt: skip
    connection.sendall("\r\n".join(lines).encode() + b'{"prompt": "a"}\n' * (4 << 16))
    return connection


def watch(server: Server, job_id: str) -> None:
    try:
        with server.http() as http, http.stream("GET", f"/v1/fine_tuning/jobs/{job_id}/events?stream=true") as answer:
            for _ in answer.iter_lines():
                pass
    except httpx.TransportError:
        pass


def ask_for_much(server: Server) -> None:
    body = {"model": "tiny", "prompt": "It was", "max_tokens": 120, "ignore_eos": True}
    try:
        with server.http() as http:
            while True:
                http.post("/v1/completions", json=body)
    except httpx.TransportError:
        pass
