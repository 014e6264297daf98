"""The end of an engine in a process of its own: of the one that other files share, after their tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.children import ENDLESS
from tests.engines import Engines
from tests.test_multiprocess import (
    PROMPTLY_S,
    assert_complete_and_resumable,
    ended,
    engine_process,
    wait_for_steps,
    wait_until,
)
from tests.trajectories import train


def test_an_engine_shut_down_during_a_job_ends_in_good_order(
    engines: Engines, engine_apart: Any, tmp_path: Path
) -> None:
    run = train(engine_apart, **ENDLESS, wait=False, output_dir=str(tmp_path / "run"))
    wait_for_steps(run, 20)
    process = engine_process(engine_apart)
    engine_apart.llm_engine.engine_core.shutdown()
    wait_until(lambda: ended(process), PROMPTLY_S)
    assert_complete_and_resumable(engines.get(), run.directory)
