"""A plugin of vLLM (`vllm.general_plugins`) that says, when asked by a signal, what was patched in its process.

Only the standard library is imported here: whether anybody imported vllm_zo before the plugins is one of the answers.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = "ZO_WITNESS_FOLDER"
_clean_start = not any(name.partition(".")[0] == "vllm_zo" for name in sys.modules)


def install(directory: Path) -> dict[str, str]:
    """Write the plugin's metadata to `directory`; returns the environment of a process that is to load it.

    Plugins are loaded in the order of the module path, so this one is first: hence no working directory in front.
    """
    package = directory / "witness-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Name: witness\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vllm.general_plugins]\nwitness = tests.witness:plugin\n")
    return {"PYTHONPATH": str(directory), "PYTHONSAFEPATH": "1", FOLDER: str(directory)}


def ask(pid: int, directory: Path, timeout_s: float = 30) -> dict[str, Any]:
    """What it says: `vllm`, the file of its vLLM; `clean_start`; `replaced`, the targets of patches applied in it."""
    answer = directory / f"{pid}.json"
    os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + timeout_s
    while not answer.exists():
        assert time.monotonic() < deadline, f"process {pid} has not loaded the witness"
        time.sleep(0.05)
    said: dict[str, Any] = json.loads(answer.read_text())
    return said


def plugin() -> None:
    """Called by vLLM in every process it starts, on the main thread."""
    signal.signal(signal.SIGUSR1, lambda *_: _answer(Path(os.environ[FOLDER])))


def _answer(directory: Path) -> None:
    import vllm

    from tests.children import replaced_in_vllm

    said = {"vllm": vllm.__file__, "clean_start": _clean_start, "replaced": sorted(replaced_in_vllm())}
    unfinished = directory / f"{os.getpid()}.tmp"
    unfinished.write_text(json.dumps(said))
    unfinished.rename(unfinished.with_suffix(".json"))
