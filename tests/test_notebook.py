"""The notebook, executed as a person executes it. What runs it is installed for the test."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "train_while_you_chat.ipynb"
RUN = "import nbformat, nbclient, sys; nb = nbformat.read(sys.argv[1], 4); nbclient.NotebookClient(nb, timeout=900, \
kernel_name='python3').execute(); nbformat.write(nb, sys.argv[1])"
"""Cell by cell; an error in a cell is an error of the process. The outputs go into the notebook."""


def test_the_notebook_holds_no_errors_and_no_paths() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not re.search(r"/(home|root|tmp|work)/", NOTEBOOK.read_text())


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(packages), "nbclient", "ipykernel"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"nbclient and ipykernel could not be installed: {done.stderr.strip()[-300:]}")
    shutil.copy(NOTEBOOK, tmp_path)
    (tmp_path / "demo").symlink_to(EXAMPLES / "demo")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_ENABLE")}
    # The project's packages first: those that come with ipykernel must not stand for them.
    path = os.pathsep.join([str(EXAMPLES.parent), str(packages)])
    executed = subprocess.run(
        [sys.executable, "-c", RUN, NOTEBOOK.name],
        cwd=tmp_path, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=1000,
    )  # fmt: skip
    assert executed.returncode == 0, executed.stderr[-4000:]
    cells = json.loads((tmp_path / NOTEBOOK.name).read_text())["cells"]
    said = ["".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", [])]
    assert any(re.search(r"succeeded ft:demo:vllm-zo:notebook:\w+\nstep 200: accuracy 0\.\d+", text) for text in said)
