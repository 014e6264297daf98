"""The model card of a run, and its way to a hub: a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from vllm_zo import JobConfig, LanguageModeling
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.cli.hub import check_hub
from vllm_zo.entrypoints.cli.model_card import Card
from vllm_zo.entrypoints.cli.recipes.recipe import resolved_recipe
from vllm_zo.errors import ConfigError

CONFIG = JobConfig(objective=LanguageModeling(), steps=7, seed=5)
METRICS = {
    "steps": 7, "train_loss": 1.25, "loss": 0.5, "accuracy": 0.75, "step": 4, "initial_loss": 2.0,
    "initial_accuracy": 0.25, "test_accuracy": 0.7,
}  # fmt: skip


def card(**changed: Any) -> Card:
    recipe = resolved_recipe({"model": "org/base", "train": "t.jsonl"}, CONFIG, ZOTrainingConfig(), {}, Path("r.yaml"))
    given = {"model": "org/base", "config": CONFIG, "data": {"training": ("t.jsonl", 640)}, "metrics": METRICS}
    return Card(**{**given, "recipe": recipe, "rank": 16, **changed})


def test_a_card_has_data_numbers_recipe_and_limits() -> None:
    text = card().text(curve=True)
    read = ModelCard(text).data.to_dict()  # as the hub reads it
    assert (read["base_model"], read["library_name"]) == ("org/base", "peft")
    for part in (
        "- training: `t.jsonl`, 640 rows", "after step 4", "| loss | 2.0000 | 0.5000 |",
        "| accuracy | 0.2500 | 0.7500 |", "- test_accuracy: 0.7000", "last of 7 steps: 1.2500", "](run.png)",
        "```yaml\nmodel: org/base\n", "seed 5", "they flatter it", "--max-lora-rank",
    ):  # fmt: skip
        assert part in text, part


def test_a_card_without_an_evaluation_says_so_and_a_whole_model_has_no_rank() -> None:
    text = card(metrics={"steps": 7, "train_loss": 1.0}, rank=None).text(curve=False)
    assert "no validation data" in text and "flatter" not in text and "before" not in text
    assert "lora" not in text and "peft" not in text and "run.png" not in text


def test_a_card_names_no_place_on_this_machine(tmp_path: Path) -> None:
    data = tmp_path / "secret place" / "t.jsonl"
    data.parent.mkdir()
    data.write_text("{}")
    recipe = resolved_recipe(
        {"model": str(tmp_path), "train": str(data)}, CONFIG, ZOTrainingConfig(), {}, tmp_path / "recipe.yaml"
    )
    assert str(tmp_path) in recipe
    text = card(model=str(tmp_path), data={"training": (str(data), 3)}, recipe=recipe).text(curve=False)
    assert str(tmp_path.parent) not in text and "secret place" not in text
    assert "base_model" not in text, "the hub would look for a repository of the directory's name"
    assert f"model: {tmp_path.name}\n" in text and "t.jsonl" in text


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """What the hub answers to a client that makes a repository and commits files to it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.refuses = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.send_error(404)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.seen.append((self.path, self.headers.get("Authorization", "")))
                status, answer = hub.answer(self.path, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.refuses:
            return 403, {"error": "no right to write"}
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return 200, {"url": f"{self.url}/ann/tuned", "name": "ann/tuned", "id": "1"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/api/models/ann/tuned/preupload/"):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return 200, {"files": modes}
        assert path.startswith("/api/models/ann/tuned/commit/"), path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitOid": "0" * 40, "commitUrl": f"{self.url}/ann/tuned/commit/0", "success": True}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.server.shutdown()


def pushed(hub: Hub, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the client reads HF_ENDPOINT when it is imported."""
    code = "import sys; from pathlib import Path; from vllm_zo.entrypoints.cli.hub import check_hub, push\n"
    code += "check_hub('ann/tuned'); print(push(Path(sys.argv[1]), 'ann/tuned'))"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "NO_PROXY": "*"}
    environment["HF_HUB_DISABLE_XET"] = "1"  # one commit over HTTP in place of the hub's store of chunks
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_files_arrive_in_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    files = {"README.md": card().text(curve=True).encode(), "adapter_model.safetensors": b"\0\1", "run.png": b"png"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    ended = pushed(hub, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip().splitlines()[-1] == f"pushed to {hub.url}/ann/tuned"
    assert hub.files == files
    assert (hub.created["name"], hub.created["organization"]) == ("tuned", "ann")
    assert hub.created.get("private") is True or hub.created["visibility"] == "private"  # by the client's version
    assert {authorization for _, authorization in hub.seen} == {"Bearer hf_x"}


def test_a_hub_that_refuses_is_told_with_the_way_by_hand(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    ended = pushed(hub, tmp_path)
    assert ended.returncode == 1 and "vllm_zo.errors.JobError: not pushed to ann/tuned: " in ended.stderr
    assert "403" in ended.stderr and f"By hand: hf upload ann/tuned {tmp_path}" in ended.stderr


def test_what_would_fail_after_the_run_is_refused_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--push-to-hub 'a/b/c': expected USER/NAME or NAME"):
        check_hub("a/b/c")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        check_hub("ann/tuned")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(
        ConfigError, match="--push-to-hub ann/tuned: not logged in; run `hf auth login`, or set HF_TOKE"
    ):
        check_hub("ann/tuned")
