"""Parts of another package: declared in entry points, known by name everywhere, unmodified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli import train_flags, use_engine, vllm_zo
from tests.engines import SENTIMENT, Engines
from vllm_zo import ConfigError, LoZO, registry
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.checkpoint.snapshot import load_snapshot
from vllm_zo.config import JobConfig
from vllm_zo.entrypoints.server.jobs.request import JobRequest, job_options, read_request
from vllm_zo.methods import ESTIMATORS, METHODS, OPTIMIZERS
from vllm_zo.objectives import OBJECTIVES, REWARDS
from vllm_zo.objectives.graders import GRADERS

GUIDE = Path(__file__).parents[1] / "docs" / "adding-a-method.md"
PACKAGE = '''
from dataclasses import dataclass

from vllm_zo.methods import SGD, LoZO
from vllm_zo.objectives import Classification
from vllm_zo.objectives.graders import GraderResult, GraderType


@dataclass(frozen=True, kw_only=True)
class Slow(LoZO):
    name = "slow"
    interval: int = 3


@dataclass(frozen=True, kw_only=True)
class Halving(SGD):
    """Half a step of SGD."""

    name = "halving"

    def update(self, theta_N, estimate, state, learning_rate):
        return super().update(theta_N, estimate, state, learning_rate / 2)


@dataclass(frozen=True)
class Weighted(Classification):
    name = "weighted"
    weight: float = 1.0

    def loss(self, cells_PC, examples):
        loss_PE, predictions_PE = super().loss(cells_PC, examples)
        return self.weight * loss_PE, predictions_PE


def brevity(completions, **columns):
    return [1.0 / (1 + len(text)) for text in completions]


@dataclass(frozen=True)
class Share:
    """Share of the characters of a text that are `letter`."""

    name: str
    letter: str
    item_fields = frozenset()

    def __call__(self, sample_text, item):
        return GraderResult(sample_text.count(self.letter) / max(len(sample_text), 1))


SHARE = GraderType(name="share", build=lambda where, spec: Share(spec["name"], spec["letter"]), fields=("letter",))
'''
ENTRY_POINTS = {
    "methods": {"slow": "zo_parts:Slow"},
    "estimators": {"median": "zo_median:MedianOfDirections"},
    "optimizers": {"halving": "zo_parts:Halving"},
    "objectives": {"weighted": "zo_parts:Weighted"},
    "graders": {"share": "zo_parts:SHARE"},
    "rewards": {"brevity": "zo_parts:brevity"},
}
METHOD = {
    "name": "slow", "eps": 1e-2, "queries": 2, "estimator": {"name": "median", "multiple": 2.0}, "optimizer": "halving",
}  # fmt: skip
OBJECTIVE = {
    "name": "weighted", "template": "{sentence} It was", "options": [" terrible", " great"], "weight": 0.5,
}  # fmt: skip
GRADER = {"type": "share", "name": "e", "letter": "e"}
SCRIPT = """
import json, sys
from vllm import LLM
from vllm_zo import Reward

model, data, parts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(model, dtype="float32", max_model_len=128, zo_training={"state_dir": data})
job = dict(train=data + "/train.jsonl", learning_rate=1e-2, batch_size=4, progress=False)
llm.finetune(method=parts["method"], objective=parts["objective"], steps=7, output_dir=data + "/job", **job)
for name, reward in (("grader", {"grader": parts["grader"]}), ("reward", {"reward": "brevity"})):
    objective = Reward("{sentence} It was", max_tokens=3, **reward)
    run = llm.finetune(objective=objective, steps=2, output_dir=f"{data}/{name}", **job)
    print(json.dumps([record["reward"] for record in run.history]))
log = open(data + "/job/seeds.log", "rb").read().splitlines(keepends=True)
open(data + "/job/seeds.log", "wb").write(b"".join(log[:-3]))
(llm.finetune(method=parts["method"], objective=parts["objective"], steps=7, output_dir=data + "/job",
              resume_from=data + "/job", **job))
"""


def declare(site: Path, entry_points: dict[str, dict[str, str]]) -> None:
    """What installing a distribution leaves behind."""
    info = site / "zo_parts-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zo-parts\nVersion: 1.0\n")
    groups = (
        "\n".join([f"[vllm_zo.{group}]", *(f"{name} = {target}" for name, target in points.items())])
        for group, points in entry_points.items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of installed packages, with a module of parts and the guide's example in it."""
    directory = tmp_path / "site"
    directory.mkdir()
    (directory / "zo_parts.py").write_text(PACKAGE)
    (directory / "zo_median.py").write_text(GUIDE.read_text().split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(directory)
    registry._installed.cache_clear()
    yield directory
    registry._installed.cache_clear()
    for name in ("zo_parts", "zo_median"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_one_of_each_trains_resumes_and_replays_in_an_engine_of_another_process(
    engines: Engines, site: Path, tmp_path: Path
) -> None:
    declare(site, ENTRY_POINTS)
    data = Path(str(train_flags(engines.model("opt"), tmp_path)[4])).parent
    parts = json.dumps({"method": METHOD, "objective": OBJECTIVE, "grader": GRADER})
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    (tmp_path / "script.py").write_text(f"if __name__ == '__main__':\n{SCRIPT.replace(chr(10), chr(10) + '    ')}")
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(engines.model("opt")), str(data), parts],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        text=True,
        capture_output=True,
    )
    assert ended.returncode == 0, ended.stderr
    rewards = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")]
    assert len(rewards) == 2 and all(0.0 <= reward <= 1.0 for run in rewards for reward in run)

    log = read_seed_log(tmp_path / "job" / "seeds.log")
    method = log.header.build_method()
    assert (type(method).__name__, type(method.estimator).__name__) == ("Slow", "MedianOfDirections")
    assert type(method.optimizer).__name__ == "Halving" and log.header.method_fields["estimator"]["multiple"] == 2.0
    assert log.num_steps == 7
    state = log.header.new_state()
    load_snapshot(tmp_path / "job" / "step-7.safetensors", state)
    assert torch.equal(state.acc_BN, rebuild_state(log).acc_BN) and bool(state.acc_BN.any())


def test_they_run_from_the_command_line(
    engines: Engines, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(site, ENTRY_POINTS)
    use_engine(monkeypatch, engines.get())
    flags = [*train_flags(engines.model("opt"), tmp_path), "--output", tmp_path / "job", "--quiet"]
    parts = ["--method", "slow", "--estimator", "median:multiple=3", "--optimizer", "halving", "--queries", 2]
    ended = vllm_zo(capsys, *flags, *parts, "--objective", "weighted", "--objective-option", "weight=0.5")
    assert ended.status == 0, ended.err
    header = read_seed_log(tmp_path / "job" / "seeds.log").header
    assert header.method == "slow" and header.method_fields["estimator"] == {"name": "median", "multiple": 3}
    assert header.job_config["objective"]["name"] == "weighted" and header.job_config["objective"]["weight"] == 0.5


def requested(**method: Any) -> JobConfig:
    """What a client's request becomes, by way of the job's record."""
    given = {"type": "zeroth_order", "zeroth_order": method}
    request = JobRequest(model="m", training_file="f", method=given)  # type: ignore[arg-type]
    wanted = read_request(JobRequest.model_validate_json(request.model_dump_json()))  # a job's record keeps the request
    assert wanted.objective is not None
    return JobConfig.from_options(job_options(wanted, 50, wanted.objective))


def test_a_client_of_the_server_names_them(site: Path) -> None:
    declare(site, ENTRY_POINTS)
    hyperparameters = {name: value for name, value in METHOD.items() if name != "name"}
    config = requested(algorithm="slow", hyperparameters=hyperparameters, objective=OBJECTIVE)
    assert config.method == METHODS.build(METHOD) and config.objective == OBJECTIVES.build(OBJECTIVE)
    for reward in ({"reward": "brevity"}, {"grader": GRADER}):
        assert requested(objective={"name": "reward", "template": "{q}", **reward}).objective.name == "reward"
    with pytest.raises(ConfigError, match=r"grader\.letter is missing"):
        requested(objective={"name": "reward", "template": "{q}", "grader": {"type": "share", "name": "e"}})


@pytest.mark.parametrize("known", [METHODS, ESTIMATORS, OPTIMIZERS, OBJECTIVES, GRADERS, REWARDS], ids=lambda k: k.kind)
def test_an_entry_point_of_another_kind_is_named(site: Path, known: registry.Registry[Any]) -> None:
    declare(site, {f"{known.kind}s": {"wrong": "zo_parts:dataclass" if known is not REWARDS else "zo_parts:SHARE"}})
    with pytest.raises(ConfigError, match=rf"entry point 'wrong' .*group 'vllm_zo\.{known.kind}s': expected a "):
        known.find("wrong")
    assert len(known) == len(list(known)) and "wrong" in known


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"lozo": "zo_parts:Slow"}, r"the name 'lozo' is taken by vllm_zo\.methods\.lozo:LoZO"),
        ({"slower": "zo_parts:Slow"}, r"the part calls itself 'slow'; use one name for both"),
        ({"slower": "zo_gone:Slow"}, r"entry point 'slower' .* cannot be loaded: No module named 'zo_gone'"),
    ],
)
def test_a_name_that_is_taken_or_leads_nowhere_is_refused(site: Path, points: dict[str, str], message: str) -> None:
    declare(site, {"methods": points})
    with pytest.raises(ConfigError, match=message):
        METHODS.build(next(iter(points)))


def test_a_broken_package_does_not_keep_others_from_their_work(site: Path) -> None:
    declare(site, {"methods": {"gone": "zo_gone:Slow"}})
    assert METHODS.build("lozo") == LoZO()


def test_a_part_of_a_script_is_registered(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zo_parts  # type: ignore[import-not-found]

    monkeypatch.setattr(METHODS, "_registered", dict(METHODS._registered))
    with pytest.raises(ConfigError, match=r"'slow' is not zo_parts:Slow.*'vllm_zo\.methods'.*or register it"):
        JobConfig(objective=SENTIMENT, method=zo_parts.Slow())
    assert METHODS.register(zo_parts.Slow) is zo_parts.Slow
    assert JobConfig(objective=SENTIMENT, method=zo_parts.Slow()).method.name == "slow"
    METHODS.register(type("Slow", (zo_parts.Slow,), {"__module__": "zo_parts"}))  # a notebook cell that is run again
    with pytest.raises(ConfigError, match=r"the name 'lozo' is taken"):
        METHODS.register(type("Other", (LoZO,), {}))
    with pytest.raises(ConfigError, match=r"expected a dataclass that derives from vllm_zo\.methods\.Method"):
        METHODS.register(zo_parts.Halving)


def test_a_package_may_declare_a_part_and_register_it_too(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(site, ENTRY_POINTS)
    import zo_parts

    monkeypatch.setattr(METHODS, "_registered", dict(METHODS._registered))
    METHODS.register(zo_parts.Slow)
    assert METHODS.find("slow") is zo_parts.Slow and list(METHODS).count("slow") == 1
