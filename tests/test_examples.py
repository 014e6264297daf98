"""Every example runs as it is printed, with fewer steps (`make test-slow`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PLAYED = r"on held-out reviews: 0\.\d+ -> 0\.\d+\nrequests of a rollout: 1\.\d+ -> 1\.\d+;.*\n.*\n  (prompt|user): "
RUNS = {  # script -> (argument: steps or requests, what it must print)
    "finetune.py": (
        6,
        r"accuracy 0\.\d+ -> 0\.\d+\n.*told \. It was .+\n.*nobody came \. It was .+\nlog and snapshots",
    ),
    "custom_method.py": (6, r"\d+ of 6 steps were clipped\naccuracy 0\.\d+ -> 0\.\d+"),
    "many_directions.py": (4, r"1 directions: \d+ ms a step.*\n4 directions: \d+ ms a step"),
    "resume_and_replay.py": (
        6,
        r"equals the unbroken one.*\n(.*\n)*step 6: equals .*, which the job wrote, bit for bit",
    ),
    "export.py": (4, r"logits moved by up to [\d.]+; adapter and merged model differ by up to \d\.\de-0[3-9]"),
    "reward.py": (
        4,
        r"sampled: 0\.\d+ in the first 10 steps, 0\.\d+ in the last\nin the format, greedy: +0\.\d+ -> 0\.\d+",
    ),
    "rollout_game.py": (3, rf"score {PLAYED}"),
    "rollout_format.py": (3, rf"the judge {PLAYED}"),
    "rollout_agent.py": (3, rf"the agent's score {PLAYED}"),
    "training_under_load.py": (3, r"meanwhile \d+ training steps.*\nits newest version: median \d+ ms"),
}
NEEDS = {"rollout_agent.py": "pydantic_ai"}
OTHERS = {"demo.py", "openai_finetune.py", "continual.py", "pretrain_demo_model.py", "reward_chat.py"}
"""Tested elsewhere (`make demo`, test_openai_server.py, test_openai_continual.py, test_models.py), or not meant to run
again."""


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs_as_printed(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    argument, printed = RUNS[name]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "VLLM_LOGGING_LEVEL": "ERROR"}  # it logs to standard output
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # the tests' own choice; an example makes its own
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), str(argument)],
        cwd=EXAMPLES.parent, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert re.search(printed, done.stdout), done.stdout[-3000:]


def test_every_example_of_this_list_is_there_and_says_how_to_run_it() -> None:
    for name in RUNS:
        assert f"python examples/{name}" in (EXAMPLES / name).read_text().split('"""')[1]
