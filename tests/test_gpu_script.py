"""`benchmarks/gpu.sh` without a GPU: what each piece would run, and that the programs take those arguments."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import facts, gpu, options

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PIECES = re.search(r'PIECES="([^"]*)"', SCRIPT.read_text())[1].split()  # type: ignore[index]
STUB = """#!/usr/bin/env bash
printf '%s\\t' "$@" >>"$CALLS"
printf '\\n' >>"$CALLS"
"""


def run(directory: Path, *arguments: str) -> tuple[int, list[list[str]]]:
    """The script with a python3 that writes down what it is asked. Returns the status and the calls."""
    kit, calls = directory / "kit", directory / "calls"
    kit.mkdir(exist_ok=True)
    (kit / "python3").write_text(STUB)
    (kit / "python3").chmod(0o755)
    (kit / "bootstrap.sh").write_text(f'export PATH="{kit}:$PATH"\n')
    calls.write_text("")
    variables = {**os.environ, "VLLM_KIT": str(kit), "OUT": str(directory / "out"), "CALLS": str(calls)}
    done = subprocess.run(["bash", str(SCRIPT), *arguments], env=variables, capture_output=True, text=True, timeout=60)
    return done.returncode, [line.split("\t")[:-1] for line in calls.read_text().splitlines()]


def test_help_and_what_is_no_piece(tmp_path: Path) -> None:
    assert [run(tmp_path, *words) for words in (("--help",), (), ("core-70b",), ("check core-13b",))] == [
        (0, []), (2, []), (2, []), (2, []),
    ]  # fmt: skip


def test_quick_is_a_short_check_and_two_sizes(tmp_path: Path) -> None:
    status, (install, tests, small, large) = run(tmp_path, "quick")
    assert status == 0 and install[:3] == ["-m", "pip", "install"]
    assert tests[:2] == ["-m", "pytest"] and "tests/test_gpu.py" in tests and "tests/test_triton_fold.py" in tests
    assert [call[call.index("--shape") + 1] for call in (small, large)] == ["1.3b", "13b"]


class Parsed(Exception):
    pass


@pytest.mark.parametrize("piece", PIECES)
def test_programs_of_a_piece_take_its_arguments(piece: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's own parser reads them, with an H200 where torch sees no GPU, and stops before it measures."""

    def stop(*arguments: Any) -> None:
        raise Parsed

    status, calls = run(tmp_path, piece)
    programs = [call for call in calls if call[0].startswith("benchmarks/")]
    assert status == 0 and programs
    monkeypatch.setattr(gpu, "find", lambda: {"name": "NVIDIA H200", "memory_bytes": 150_000_000_000})
    monkeypatch.setattr(facts, "chosen_cores", stop)
    monkeypatch.setattr(facts, "machine", stop)
    monkeypatch.setattr(options, "chosen_cores", stop)
    for file, *arguments in programs:
        program = importlib.import_module(f"benchmarks.{Path(file).stem}")
        monkeypatch.setattr(sys, "argv", [file, *arguments])
        with pytest.raises(Parsed):
            program.main()


def test_contenders_of_the_pieces_are_there(tmp_path: Path) -> None:
    from benchmarks.baselines import CONTENDERS, CPU_ONLY

    named = set(re.findall(r"--against ([\w,-]+)", SCRIPT.read_text()))
    contenders = {name for names in named for name in names.split(",")}
    assert contenders <= set(CONTENDERS) - set(CPU_ONLY) and "gemms" in contenders
