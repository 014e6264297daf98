"""`vllm-zo serve`: flags, environment and refusals, all before an engine is started."""

from __future__ import annotations

import json
import os
import shlex
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from tests.engines import Engines
from tests.openai_server import Server, create, upload_reviews, wait_for
from vllm_zo import ConfigError
from vllm_zo.entrypoints.openai import launch
from vllm_zo.entrypoints.openai.plugin import TrainingEndpoints
from vllm_zo.entrypoints.openai.settings import ServerSettings
from vllm_zo.entrypoints.openai.state_dir import StateDir


@pytest.fixture
def model(engines: Engines) -> str:
    return str(engines.model("opt"))


def test_nobodys_plugin_is_switched_off() -> None:
    names = launch.plugin_allow_list({}).split(",")
    assert {"zo", "zo_server"} <= set(names) and len(names) == len(set(names))
    assert {point.name for point in entry_points(group="vllm.general_plugins")} <= set(names)
    assert launch.plugin_allow_list({"VLLM_PLUGINS": "mine,zo"}) == "mine,zo,zo_server", "what the user allows stays"


def test_other_peoples_endpoint_plugins_stay_opt_in(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def __init__(self, name: str) -> None:
            self.name = name

    class Found:
        groups = frozenset({"vllm.general_plugins", "vllm.endpoint_plugins", "console_scripts"})

        def select(self, group: str) -> list[Point]:
            return {"vllm.general_plugins": [Point("a")], "vllm.endpoint_plugins": [Point("routes")]}.get(group, [])

    monkeypatch.setattr(launch, "entry_points", Found)
    assert launch.plugin_allow_list({}) == "a,zo,zo_server"


def test_vllm_finds_the_endpoints() -> None:
    (point,) = entry_points(group="vllm.endpoint_plugins", name="zo_server")
    plugin = point.load()()
    assert isinstance(plugin, TrainingEndpoints) and plugin.name == "zo_server"


def test_our_routes_stand_for_vllms_of_the_same_path_and_method() -> None:
    app = FastAPI()
    kept = [app.post("/v1/models"), app.get("/v1/models/elsewhere"), app.get("/health")]
    for route in (*kept, app.get("/v1/models")):
        route(lambda: "vLLM's")
    TrainingEndpoints().attach_router(app)
    routes = [route for route in app.router.routes if isinstance(route, APIRoute)]
    vllms = [(route.path, *route.methods) for route in routes if route.name == "<lambda>"]
    assert vllms == [("/v1/models", "POST"), ("/v1/models/elsewhere", "GET"), ("/health", "GET")]
    listing = [route for route in routes if route.path == "/v1/models" and "GET" in route.methods]
    assert [route.endpoint.__name__ for route in listing] == ["list_models"]


def test_flags_become_engine_options(model: str, tmp_path: Path) -> None:
    args = launch.parse(
        [model, "--port", "9000", "--zo-state-dir", str(tmp_path), "--zo-concurrent-jobs", "3", "--zo-slot-rank", "32",
         "--zo-token-budget", "64", "--zo-upload-limit-mb", "7", "--allow-python-graders", "--max-loras", "2"]
    )  # fmt: skip
    zo, server = args.additional_config["zo_training"], args.additional_config["zo_server"]
    assert (zo["concurrent_jobs"], zo["slots"], zo["slot_rank"], zo["token_budget"]) == (3, 2, 32, 64)
    assert zo["state_dir"] == str(tmp_path) and server["upload_limit_mb"] == 7 and server["allow_python_graders"]
    assert args.enable_lora and args.max_loras == 2 + 3 * 2 and args.max_lora_rank == 32 and args.port == 9000
    assert args.model == model


@pytest.mark.parametrize(("flags", "budget"), [([], launch.DEFAULT_TOKEN_BUDGET), (["--zo-token-budget", "0"], None)])
def test_jobs_are_held_back_beside_requests_unless_told_otherwise(model: str, flags: list[str], budget: Any) -> None:
    assert launch.parse([model, *flags]).additional_config["zo_training"]["token_budget"] == budget


def test_the_printed_command_gives_the_same_engine(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # `serve` is free to set what it likes
    launch.serve([model, "--port", "9000", "--zo-print-flags", "--zo-state-dir", str(tmp_path)])
    plugins, vllm, serve, *flags = shlex.split(capsys.readouterr().out)
    assert plugins.startswith("VLLM_PLUGINS=") and "zo_server" in plugins and (vllm, serve) == ("vllm", "serve")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plain = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    ours = launch.parse([model, "--port", "9000", "--zo-state-dir", str(tmp_path)])
    for name in (*launch.PRINTED, "additional_config", "model_tag", "port"):
        assert getattr(plain, name) == getattr(ours, name), name
    assert not list(tmp_path.iterdir()), "nothing was started"


def test_plain_vllm_serve_with_the_printed_flags_trains_too(model: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    server = Server(model, state, "--zo-upload-limit-mb", "1", plain=True, VLLM_CPU_KVCACHE_SPACE="1")
    try:
        client = server.wait_until_ready().client()
        job = create(client, upload_reviews(client), hyperparameters={"steps": 3})
        name = wait_for(client, job.id, "succeeded").fine_tuned_model
        assert client.completions.create(model=name, prompt="a warm story", max_tokens=2).choices[0].text
        with pytest.raises(openai.APIStatusError, match="1 MiB"):
            client.files.create(file=("big.jsonl", b" " * (2 << 20)), purpose="fine-tune")
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--api-server-count", "2"], "--api-server-count=2: one server owns the jobs; set it to 1"),
        (["--data-parallel-size", "2"], "--data-parallel-size=2: data-parallel engines would train apart"),
        (["--headless"], "training needs the HTTP server"),
        (["--pipeline-parallel-size", "2"], "pipeline_parallel_size=2 with zo_training"),
        (["--scheduler-cls", "a.b"], "scheduler_cls='a.b' with zo_training"),
        (["--zo-token-budget", "-1"], "zo_training.token_budget=-1"),
        (["--zo-slots", "1"], "zo_training.slots=1"),
        (["--zo-slot-rank", "17"], "zo_training.slot_rank=17"),
        (["--zo-concurrent-jobs", "0"], "zo_training.concurrent_jobs=0"),
        (["--zo-upload-limit-mb", "0"], "zo_server.upload_limit_mb=0"),
    ],
)
def test_what_cannot_work_is_refused_by_name(model: str, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        launch.parse([model, *flags])


def test_a_second_server_on_a_state_directory_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    owner = StateDir(tmp_path).acquire()
    with pytest.raises(ConfigError, match="another server owns it"):
        launch.serve([model, "--zo-state-dir", str(tmp_path)])
    owner.release()


@pytest.mark.parametrize("config", [{"zo_server": {"upload_limit": 1}}, {"zo_server": {"allow_python_graders": "yes"}}])
def test_settings_by_hand_are_checked(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'upload_limit_mb'|expected True or False"):
        ServerSettings.from_config(json.loads(json.dumps(config)))
