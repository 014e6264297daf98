"""SIGTERM ends the server within 10 s in every state, and nothing of it is left. (Graders: `test_hostile.py`.)"""

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

from tests.engines import Engines
from tests.openai_server import FLAGS, KEY, START_S, Server, create, upload_reviews, wait_for

END_BOUND_S = 10.0
"""Until the process has ended; its children follow at once."""


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
