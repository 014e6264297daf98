"""Clients of OpenAI's fine-tuning API as people have them, unmodified, against the real server: the last Python SDK
that has a command line, LiteLLM, and the Node SDK. Each is installed for its test; the newest Python SDK drives all the
others (test_openai_*.py)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.openai_server import KEY, Server, Servers, jsonl

pytestmark = pytest.mark.slow

CLI = "openai==2.34.0"
"""2.35 has no commands any more."""
LITELLM = "litellm==1.110.2"
NODE = "openai@7.59.0"
SCRIPTS = Path(__file__).parent / "clients"
CHATS = [
    {"messages": [{"role": "user", "content": f"is it {word}"}, {"role": "assistant", "content": "it is good"}]}
    for word in ("good", "bad", "great", "dull", "fine", "poor", "warm", "cold")
]


@pytest.fixture
def server(servers: Servers) -> Server:
    return servers.running()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(jsonl(CHATS))
    return path


def clean() -> dict[str, str]:
    """Nothing of this repository and of the SDK's own variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTHON", "VLLM_"))}


def run(command: list[Any], **variables: str) -> str:
    done = subprocess.run(list(map(str, command)), env=clean() | variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def installed(command: list[Any], what: str, **options: Any) -> None:
    """Run an installer. Skips the test where it has no index to install from."""
    done = subprocess.run(list(map(str, command)), env=clean(), capture_output=True, text=True, timeout=600, **options)
    if done.returncode:
        pytest.skip(f"{what} could not be installed: {done.stderr.strip()[-300:]}")


def python_with(tmp_path: Path, requirement: str) -> Path:
    """The interpreter of a new virtual environment."""
    run([sys.executable, "-m", "venv", tmp_path / "venv"])
    python = tmp_path / "venv" / "bin" / "python"
    installed([python, "-m", "pip", "install", "-q", requirement], requirement)
    return python


def test_the_last_sdk_with_a_command_line(server: Server, tmp_path: Path, data: Path) -> None:
    program = python_with(tmp_path, CLI).with_name("openai")

    def api(*words: Any) -> Any:
        # Its `-b` wants a slash at the end of the address, or else it leaves out the `/v1`. The variables do not.
        return json.loads(run([program, "api", *words], OPENAI_BASE_URL=f"{server.url}/v1", OPENAI_API_KEY=KEY))

    file = api("files.create", "-f", data, "-p", "fine-tune")
    more = ("-V", file["id"], "-s", "from-a-shell", "-H", json.dumps({"n_epochs": 2, "batch_size": "auto"}))
    job = api("fine_tuning.jobs.create", "-m", server.model, "-F", file["id"], *more)
    assert job["id"] in [one["id"] for one in api("fine_tuning.jobs.list", "-l", 5)["data"]]
    while (job := api("fine_tuning.jobs.retrieve", "-i", job["id"]))["status"] not in ("succeeded", "failed"):
        time.sleep(0.2)
    assert job["status"] == "succeeded", job["error"]
    events = api("fine_tuning.jobs.list_events", "-i", job["id"], "-l", 5)["data"]
    assert events[0]["message"] == "The job has successfully completed"
    assert api("models.retrieve", "-i", job["fine_tuned_model"])["id"] == job["fine_tuned_model"]
    asked = ("chat.completions.create", "-m", job["fine_tuned_model"], "-g", "user", "is it good", "-M", "4")
    assert run([program, "-b", f"{server.url}/v1/", "-k", KEY, "api", *asked]).strip()
    long = api("fine_tuning.jobs.create", "-m", server.model, "-F", file["id"], "-H", json.dumps({"n_epochs": 10_000}))
    assert api("fine_tuning.jobs.cancel", "-i", long["id"])["id"] == long["id"]


def test_litellms_fine_tuning_calls(server: Server, tmp_path: Path, data: Path) -> None:
    python = python_with(tmp_path, LITELLM)
    script = [python, SCRIPTS / "litellm_finetune.py", f"{server.url}/v1", KEY, server.model, data]
    said = run(script, LITELLM_LOCAL_MODEL_COST_MAP="True")  # else it fetches prices from the network
    assert said.splitlines()[-1].startswith("ft:tiny:vllm-zo:litellm:")


def test_the_node_sdk(server: Server, tmp_path: Path, data: Path) -> None:
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("the Node SDK needs npm and node")
    (tmp_path / "package.json").write_text('{"private": true}')
    installed(["npm", "install", "--silent", NODE], NODE, cwd=tmp_path)
    script = tmp_path / "finetune.mjs"  # node looks for packages beside the script
    shutil.copy(SCRIPTS / "finetune.mjs", script)
    said = run(["node", script, f"{server.url}/v1", KEY, server.model, data])
    assert said.strip().startswith("ft:tiny:vllm-zo:node:")
