"""`vllm-zo serve`: flags, environment and refusals, all before an engine is started."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
from argparse import Namespace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from tests.engines import Engines
from tests.openai_server import Server, create, upload_reviews, wait_for
from vllm_zo import ConfigError
from vllm_zo.compat import registry
from vllm_zo.entrypoints.server import launch
from vllm_zo.entrypoints.server.plugin import TrainingEndpoints
from vllm_zo.entrypoints.server.settings import ServerSettings
from vllm_zo.entrypoints.server.state.directory import StateDir


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


def test_our_routes_stand_for_vllms_of_the_same_path_and_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """On releases before 0.32; later ones do it by themselves, after `attach_router`."""
    monkeypatch.setattr(registry, "exists", lambda target: False)
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
         "--zo-token-budget", "64", "--zo-kept-states-mib", "9", "--zo-upload-limit-mb", "7",
         "--allow-python-graders", "--max-loras", "2"]
    )  # fmt: skip
    zo, server = args.additional_config["zo_training"], args.additional_config["zo_server"]
    assert (zo["concurrent_jobs"], zo["slots"], zo["slot_rank"], zo["token_budget"]) == (3, 2, 32, 64)
    assert zo["kept_states_mib"] == 9
    assert zo["state_dir"] == str(tmp_path) and server["upload_limit_mb"] == 7 and server["allow_python_graders"]
    assert args.enable_lora and args.max_loras == 2 + 3 * 2 and args.max_lora_rank == 32 and args.port == 9000
    assert args.model == model


@pytest.mark.parametrize(
    ("flags", "held_back"),
    [
        ([], {"slowdown": 1.1, "token_budget": None, "window": None, "idle_only": False}),
        (["--zo-slowdown", "1.5", "--zo-token-budget", "64"], {"slowdown": 1.5, "token_budget": 64}),
        (["--zo-slowdown", "0", "--zo-token-budget", "0"], {"slowdown": None, "token_budget": None}),
        (["--zo-window", "22:00-06:00", "--zo-idle-only"], {"window": "22:00-06:00", "idle_only": True}),
    ],
)
def test_jobs_are_held_back_beside_requests_unless_told_otherwise(
    model: str, flags: list[str], held_back: dict[str, Any]
) -> None:
    zo = launch.parse([model, *flags]).additional_config["zo_training"]
    assert {name: zo[name] for name in held_back} == held_back


def test_the_printed_command_gives_the_same_engine(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # `serve` is free to set what it likes; the tests' own settings must not count as a user's
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_CPU_", "GOMP_"))}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    launch.serve([model, "--port", "9000", "--zo-print-flags", "--zo-state-dir", str(tmp_path)])
    words = shlex.split(capsys.readouterr().out)
    start = words.index("vllm")
    variables, (_, serve, *flags) = dict(word.split("=", 1) for word in words[:start]), words[start:]
    assert "zo_server" in variables.pop("VLLM_PLUGINS") and serve == "serve"
    assert "VLLM_CPU_KVCACHE_SPACE" in variables, "vLLM's own default is nearly all memory"
    assert "GOMP_SPINCOUNT" in variables, "threads that wait would keep both cores from the engine's process"
    assert variables.items() <= os.environ.items()
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plain = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    ours = launch.parse([model, "--port", "9000", "--zo-state-dir", str(tmp_path)])
    for name in (*launch.PRINTED, "additional_config", "model_tag", "port"):
        assert getattr(plain, name) == getattr(ours, name), name
    assert not list(tmp_path.iterdir()), "nothing was started"


@pytest.mark.slow
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
        (["--data-parallel-size", "2", "--data-parallel-rank", "0"], "--data-parallel-rank=0: .* give --data-parallel"),
        (["--data-parallel-address", "10.0.0.1"], "--data-parallel-address=10.0.0.1: this server starts all engines"),
        (["--data-parallel-backend", "ray"], "--data-parallel-backend=ray: expected mp"),
        (["--headless"], "training needs the HTTP server"),
        (["--pipeline-parallel-size", "2", "--data-parallel-size", "2"], "with pipeline_parallel_size=2 and zo_train"),
        (["--scheduler-cls", "a.b"], "scheduler_cls='a.b' with zo_training"),
        (["--zo-token-budget", "-1"], "zo_training.token_budget=-1"),
        (["--zo-slots", "1"], "zo_training.slots=1"),
        (["--zo-slowdown", "1"], r"zo_training.slowdown=1.0: expected a number > 1; None sets no target"),
        (["--zo-slowdown", "0.9"], r"zo_training.slowdown=0.9"),
        (["--zo-window", "22-6"], r"zo_training.window='22-6': expected two times of day"),
        (["--zo-window", "7:00-07:00"], r"an end that differs from the beginning; for the whole day, leave it out"),
        (["--zo-slot-rank", "17"], "zo_training.slot_rank=17"),
        (["--zo-concurrent-jobs", "0"], "zo_training.concurrent_jobs=0"),
        (["--zo-upload-limit-mb", "0"], "zo_server.upload_limit_mb=0"),
    ],
)
def test_what_cannot_work_is_refused_by_name(model: str, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        launch.parse([model, *flags])


def test_the_key_may_come_from_a_file(model: str, tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text("api-key: secret\n")
    assert launch.parse([model, "--config", str(tmp_path / "server.yaml")]).api_key == ["secret"]


def test_engines_of_one_server_share_the_cores(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 4, 5, 6})
    os.environ.pop("VLLM_CPU_OMP_THREADS_BIND", None)
    args = launch.parse([model, "--data-parallel-size", "2"])
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "2,3|4,5"
    assert args.scheduler_cls == "vllm_zo.entrypoints.cluster.seats.make_scheduler" and args.api_server_count == 1
    with pytest.raises(ConfigError, match=r"BIND='2,3\|4,5': 2 lists of cores for 3 workers; give one for each"):
        launch.parse([model, "--data-parallel-size", "3"])
    del os.environ["VLLM_CPU_OMP_THREADS_BIND"]
    with pytest.raises(ConfigError, match="data_parallel_size=6: this process may use 5 cores; start fewer engines"):
        launch.parse([model, "--data-parallel-size", "6"])


def test_a_second_server_on_a_state_directory_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    owner = StateDir(tmp_path).acquire()
    with pytest.raises(ConfigError, match="another server owns it"):
        launch.serve([model, "--zo-state-dir", str(tmp_path)])
    owner.release()


def test_a_port_in_use_is_refused_before_the_model_is_loaded(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {port}: cannot listen there: Address already"):
            launch.serve([model, "--host", "127.0.0.1", "--port", port, "--zo-state-dir", str(tmp_path)])


def test_a_browser_may_read_that_its_key_is_wrong() -> None:
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

    app = FastAPI()
    TrainingEndpoints().attach_router(app)
    given = Namespace(
        allowed_origins=["*"], allow_credentials=False, allowed_methods=["*"], allowed_headers=["*"], api_key=["right"],
        enable_request_id_headers=False, middleware=[],
    )  # fmt: skip
    init_entrypoints_middleware(given, app, ())
    answer = TestClient(app).get("/v1/files", headers={"Origin": "https://elsewhere", "Authorization": "Bearer wrong"})
    assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "*"


def test_the_page_works_under_a_proxys_prefix() -> None:
    app = FastAPI()
    TrainingEndpoints().attach_router(app)
    page = TestClient(app).get("/fine-tuning").text
    assert 'fetch("v1"' in page and not re.search(r"""["'`(=]/(v1|fine-tuning)""", page), "an absolute URL"


@pytest.mark.parametrize("config", [{"zo_server": {"upload_limit": 1}}, {"zo_server": {"allow_python_graders": "yes"}}])
def test_settings_by_hand_are_checked(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'upload_limit_mb'|expected True or False"):
        ServerSettings.from_config(json.loads(json.dumps(config)))
