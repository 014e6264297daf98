"""The series in `patches/` on a copy of the installed vLLM: it applies, jobs run on it, run-time patches step aside.

The copy holds the Python files; compiled libraries and data are links. Child processes find it before the original.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.platforms import current_platform

from tests import witness
from tests.children import Child, first_logprob
from tests.engines import Engines
from tests.openai_server import Server, create, upload_reviews, wait_for
from tests.trajectories import steps_of, train
from vllm_zo.compat.engine_core import COMING, WAITING
from vllm_zo.entrypoints.server.patches import STARTING
from vllm_zo.worker.cpu.patches import (
    ATTENTION,
    CPU_LINEAR,
    DECODER_LAYER,
    INTEGER_KERNEL,
    LORA_LINEAR,
    MODEL_FORWARD,
    ONE_PROCESS,
    PACKED_WEIGHT,
)
from vllm_zo.worker.patches import COMPUTE_LOGITS

ROOT = Path(__file__).parents[1]
SERIES = sorted((ROOT / "patches").glob("*.patch"))
OF_CLASSES = {COMING.target, WAITING.target} | (
    {CPU_LINEAR.target, ONE_PROCESS.target, PACKED_WEIGHT.target, INTEGER_KERNEL.target}
    if current_platform.is_cpu()
    else set()
)
OF_OBJECTS = {COMPUTE_LOGITS.target, *(p.target for p in (MODEL_FORWARD, DECODER_LAYER, ATTENTION, LORA_LINEAR))}
"""What the series does not cover: the run-time patches that are left in every process, and on a worker's objects."""
ENGINE_TESTS = ("tests/test_seams.py", "tests/test_serving.py", "tests/test_multiprocess.py")


def copy_of_vllm(directory: Path) -> Path:
    """`directory/vllm`, a package of its own with the installed one's libraries."""
    source = Path(vllm.__file__).parent

    def copy(file: str, to: str) -> None:
        if file.endswith(".py"):
            shutil.copyfile(file, to)
        else:
            os.symlink(file, to)

    shutil.copytree(source, directory / "vllm", copy_function=copy, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def apply(patch: Path, tree: Path) -> None:
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree)}  # a repository around it is none of its business
    subprocess.run(["git", "apply", "--whitespace=error", str(patch)], cwd=tree, check=True, env=environment)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_of_vllm(tmp_path_factory.mktemp("patched"))
    for patch in SERIES:
        apply(patch, tree)
    return tree


def environment(tree: Path) -> dict[str, str]:
    """Of a child that finds the copy; it may keep the compiled modules, for the next child."""
    # What was given stays: `ci/matrix.sh --overlay` has the distribution of its vLLM there.
    path = [str(tree), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": ""}


def test_a_job_on_the_patched_tree_is_the_same_job_without_the_run_time_patches(
    engines: Engines, tree: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    child = Child("train_on_patched_tree", str(engines.model("opt")), str(directory), **environment(tree))
    report: dict[str, Any] = {}
    for part in child.finish():
        report |= part
    assert report["vllm"] == str(tree / "vllm" / "__init__.py")
    assert report["clean_start"], "vllm_zo was imported before LLM(zo_training=True)"
    here = train(engines.get(), output_dir=str(tmp_path / "here"))
    assert steps_of(directory) == steps_of(Path(here.directory)), "the same steps, bit for bit"
    assert report["answer"] == pytest.approx(first_logprob(engines.get(), here.lora_request), abs=1e-6)
    assert set(report["replaced"]) == OF_CLASSES
    assert set(report["replaced_on_objects"]) == OF_OBJECTS and report["wrapper"] == "GroupedPunicaWrapper"


@pytest.mark.slow
def test_the_flag_and_the_endpoint_plugins_it_opts_into(engines: Engines, tree: Path, tmp_path: Path) -> None:
    package = tmp_path / "other-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: other\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vllm.endpoint_plugins]\nother = tests.children:Endpoints\n")
    path = os.pathsep.join([environment(tree)["PYTHONPATH"], str(tmp_path)])
    reports = Child("patched_command_line", str(engines.model("opt")), PYTHONPATH=path).finish()
    meanings = {r["flag"]: r["means"] for r in reports if "flag" in r}
    assert meanings == {"": False, "--zo-training": True, '--zo-training={"slots": 4}': {"slots": 4}}
    assert [r for r in reports if "max_loras" in r] == [{"max_loras": 1 + 4, "enable_lora": True, "slots": 4}]
    loaded = {(r["allowed"], r["opted_in"]): r["loaded"] for r in reports if "loaded" in r}
    assert loaded == {(None, False): [], (None, True): ["other"], ("zo", False): [], ("zo", True): []}
    assert {r["zo_training"]: r["attached"] for r in reports if "attached" in r} == {False: [], True: ["zo_server"]}


@pytest.mark.slow
def test_vllm_serve_trains_over_http_without_the_run_time_patches(engines: Engines, tree: Path, tmp_path: Path) -> None:
    """The command of the copy, as its user would type it. vllm_zo is not imported for it."""
    seen, patched = witness.install(tmp_path / "witness"), environment(tree)
    path = os.pathsep.join([seen["PYTHONPATH"], patched["PYTHONPATH"]])
    watched = {**seen, **patched, "PYTHONPATH": path}
    server = Server(str(engines.model("opt")), tmp_path / "state", patched=True, **watched)
    try:
        client = server.wait_until_ready().client()
        job = wait_for(client, create(client, upload_reviews(client), hyperparameters={"steps": 6}).id, "succeeded")
        before, after = (
            client.completions.create(model=name, prompt="the story is dull", max_tokens=2, temperature=0, logprobs=1)
            for name in ("tiny", f"job:{job.id}")
        )
        assert before.choices[0].logprobs.token_logprobs != after.choices[0].logprobs.token_logprobs
        processes = [server.process.pid, *(process.pid for process in server.engine_processes)]
        said = [witness.ask(pid, tmp_path / "witness") for pid in processes]
        assert server.stop() == 0
    finally:
        if server.process.poll() is None:
            server.kill()
    assert len(said) == 2, "server, and the engine with its worker"
    for answer in said:
        assert answer["clean_start"], "vllm_zo was imported before vLLM loaded its plugins"
        assert answer["vllm"] == str(tree / "vllm" / "__init__.py")
        # vLLM's `setup_server`, in a process that has imported it, and what only the process of a model needs.
        of_models = {PACKED_WEIGHT.target, INTEGER_KERNEL.target}
        assert set(answer["replaced"]) - {STARTING.target} - of_models == OF_CLASSES - of_models
    assert STARTING.target in said[0]["replaced"]
    assert set(said[1]["replaced"]) >= OF_CLASSES


def test_each_patch_stands_on_the_ones_before_it(tmp_path: Path) -> None:
    """One by one, as they would be merged: each applies and leaves files that Python can read."""
    tree = copy_of_vllm(tmp_path)
    for patch in SERIES:
        apply(patch, tree)
        touched = [line[6:] for line in patch.read_text().splitlines() if line.startswith("+++ b/")]
        for file in touched:
            compile((tree / file).read_text(), file, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("path", ENGINE_TESTS)
def test_the_engine_tests_pass_on_the_patched_tree(tree: Path, path: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment(tree)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
