"""A method of another package: declared in an entry point, known by name everywhere, unmodified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli import train_flags, use_engine, vllm_zo
from tests.engines import SENTIMENT, Engines, reviews
from vllm_zo import ConfigError
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log import read_seed_log
from vllm_zo.checkpoint.snapshot import load_snapshot
from vllm_zo.methods import _declared, build_method

GUIDE = Path(__file__).parents[1] / "docs" / "adding-a-method.md"


def declare(site: Path, target: str) -> None:
    """What installing a distribution leaves behind."""
    info = site / "zo_median-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zo-median\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vllm_zo.methods]\nmedian = {target}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of installed packages, with the guide's example as a module in it."""
    directory = tmp_path / "site"
    directory.mkdir()
    (directory / "zo_median.py").write_text(GUIDE.read_text().split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(directory)
    _declared.cache_clear()
    yield directory
    _declared.cache_clear()


def test_it_trains_replays_and_runs_from_the_command_line(
    engines: Engines,
    site: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    declare(site, "zo_median:MedianOfDirections")
    llm = engines.get()
    run = llm.finetune(
        reviews(16), objective=SENTIMENT, method={"name": "median", "interval": 3, "eps": 1e-2}, learning_rate=1e-2,
        batch_size=4, steps=7, progress=False,
    )  # fmt: skip
    log = read_seed_log(run.directory / "seeds.log")
    assert log.header.method == "median" and log.num_steps == 7
    state = log.header.new_state()
    load_snapshot(run.version_file, state)
    assert torch.equal(state.acc_BN, rebuild_state(log).acc_BN) and bool(state.acc_BN.any())
    use_engine(monkeypatch, llm)
    flags = [*train_flags(engines.model("opt"), tmp_path), "--output", tmp_path / "job", "--method", "median"]
    ended = vllm_zo(capsys, *flags, "--method-option", "queries=3", "--quiet")
    assert ended.status == 0, ended.err
    assert read_seed_log(tmp_path / "job" / "seeds.log").header.method_fields["queries"] == 3


def test_an_entry_point_that_is_no_method_is_named(site: Path) -> None:
    declare(site, "zo_median:derive_key")
    with pytest.raises(ConfigError, match=r"entry point 'median' .*expected a subclass of vllm_zo.methods.Method, got"):
        build_method("lozo")


def test_a_name_that_is_taken_is_refused(site: Path) -> None:
    source = (site / "zo_median.py").read_text().replace('name = "median"', 'name = "lozo"')
    (site / "zo_median_other.py").write_text(source)
    declare(site, "zo_median_other:MedianOfDirections")
    with pytest.raises(ConfigError, match=r"the name 'lozo' is taken by LoZO"):
        build_method("lozo")
