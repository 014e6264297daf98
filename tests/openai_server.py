"""The real server as a child process, as a user starts it, and the real OpenAI SDK to drive it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI

from tests.engines import reviews
from vllm_zo.entrypoints.server.keys.key_file import KeyFile, read_key_file

START_S = 180
"""Until it serves; 25 s on a quiet machine."""
SENTIMENT = {"name": "classification", "template": "{sentence} It was", "options": [" terrible", " great"]}
METHOD = {"rank": 2, "interval": 20, "bases": 1, "eps": 1e-2, "learning_rate": 1e-2}
"""A job that moves a little model visibly in a few steps."""
KEY = "sk-test"


CHAT_TEMPLATE = (
    "</s>{% for m in messages %} {{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %} assistant : {% endif %}"
)
PREFIX = "/zo"
FLAGS = (
    "--zo-concurrent-jobs", "2", "--chat-template", CHAT_TEMPLATE, "--zo-rollout-hosts", "127.0.0.1",
    "--root-path", PREFIX,
)  # fmt: skip
"""With `--root-path` the server answers under the prefix and without it."""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


OURS = (sys.executable, "-c", "from vllm_zo.entrypoints.cli.app import main; main()", "serve")
PLAIN = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
"""The server module of vLLM; its `vllm serve` command runs the same, and does not start on the CPU build."""
PATCHED = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")
"""The command `vllm serve` of a vLLM with `patches/`, which starts on any build."""


class Server:
    """`vllm-zo serve MODEL`. A log of what it prints is shown when something fails.

    Args:
        name: of the model, for clients.
        plain: start vLLM's own server instead, with what `--zo-print-flags` says.
        patched: start `vllm serve MODEL --zo-training` instead.
    """

    def __init__(
        self,
        model: str,
        state_dir: Path,
        *flags: str,
        name: str = "tiny",
        plain: bool = False,
        patched: bool = False,
        **environment: str,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = state_dir.with_suffix(".log")
        self.model = name
        training = [f"--zo-training={json.dumps({'state_dir': str(state_dir)})}"]
        command = [
            *(PATCHED if patched else OURS),
            model,
            "--served-model-name",
            self.model,
            "--dtype",
            "float32",
            "--max-model-len",
            "128",
        ]
        command += ["--block-size", "32", "--host", "127.0.0.1", "--port", str(self.port)]
        command += [*(training if patched else ("--zo-state-dir", str(state_dir))), "--api-key", KEY, *flags]
        if plain:
            command, allowed = printed_command([*command, "--zo-print-flags"])
            environment = {**environment, **allowed}
        with self.log.open("ab") as log:
            inherited = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
            self.process = subprocess.Popen(
                command, env=inherited | environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_until_ready(self, limit_s: float = START_S) -> Server:
        deadline = time.monotonic() + limit_s
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.tail()
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.2)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def client(self, key: str = KEY, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def http(self, key: str = KEY) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    @property
    def engine(self) -> psutil.Process:
        return next(child for child in self.engine_processes if "EngineCore" in " ".join(child.cmdline()))

    @property
    def engine_processes(self) -> list[psutil.Process]:
        """The engine and its worker, by the titles that vLLM gives its processes."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "VLLM::" in " ".join(child.cmdline())]

    def kill(self) -> None:
        """kill -9 of everything at once, as when the machine loses its power."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def printed_command(command: list[str]) -> tuple[list[str], dict[str, str]]:
    """What `--zo-print-flags` prints, as a command that starts on any build, and its environment."""
    line = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    words = shlex.split(line)
    start = words.index("vllm")
    vllm, serve, *flags = words[start:]
    assert (vllm, serve) == ("vllm", "serve")
    return [*PLAIN, "--model", *flags], dict(word.split("=", 1) for word in words[:start])


class Servers:
    """One server at a time on one state directory: started when it is first asked for, and again after its end."""

    def __init__(self, model: str, state_dir: Path) -> None:
        self.model, self.state_dir = model, state_dir
        self.keys = state_dir.with_name("keys.json")
        self._server: Server | None = None

    def running(self) -> Server:
        if self._server is None or self._server.process.poll() is not None:
            if not self.keys.exists():
                KeyFile().write(self.keys)
            flags = (*FLAGS, "--zo-keys", str(self.keys), "--allow-python-graders")
            self._server = Server(self.model, self.state_dir, *flags).wait_until_ready()
        return self._server

    def key_of(self, project: str, **limits: int) -> str:
        """A new key of a project."""
        file, _, secret = read_key_file(self.keys).with_key(project, limits, 0)
        file.write(self.keys)
        return secret

    def end(self) -> None:
        if self._server is not None and self._server.process.poll() is None:
            self._server.kill()


def jsonl(rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def upload_reviews(client: OpenAI, count: int = 16, seed: int = 1) -> str:
    return str(client.files.create(file=("train.jsonl", jsonl(reviews(count, seed=seed))), purpose="fine-tune").id)


def create(client: OpenAI, training_file: str, model: str = "tiny", objective: Any = SENTIMENT, **more: Any) -> Any:
    """A zeroth-order job; `hyperparameters` and anything else of `jobs.create`."""
    hyperparameters = {**METHOD, **more.pop("hyperparameters", {})}
    method: Any = {"type": "zeroth_order", "zeroth_order": {"hyperparameters": hyperparameters, "objective": objective}}
    return client.fine_tuning.jobs.create(model=model, training_file=training_file, method=method, **more)


def wait_for(client: OpenAI, job_id: str, *statuses: str, step: int = 0, timeout_s: float = 90) -> Any:
    """The job once it is in one of the statuses and has taken that many steps."""
    deadline = time.monotonic() + timeout_s
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in statuses and (job.model_extra or {})["step"] >= step:
            return job
        events = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=5).data]
        wrong = job.status in ("succeeded", "failed", "cancelled") or time.monotonic() > deadline
        assert not wrong, f"{job.status}, waiting for {statuses} at step {step}: {job.error} {events}"
        time.sleep(0.1)
