"""The command `vllm-zo` in this process: what it prints and how it ends, on an engine that the tests share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engines import reviews
from vllm_zo.entrypoints.cli import train as train_command
from vllm_zo.entrypoints.cli.app import main


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a refusal or a failure ends with."""
        assert "Traceback" not in self.err, self.err
        line = self.err.splitlines()[-1]
        assert line.startswith("vllm-zo: "), self.err
        return line


def vllm_zo(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return Outcome(int(ended.value.code or 0), printed.out, printed.err)


def use_engine(monkeypatch: pytest.MonkeyPatch, llm: Any) -> None:
    """Let `vllm-zo train` run on this engine instead of one of its own."""
    monkeypatch.setattr(train_command, "start_engine", lambda *_, **__: llm)


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def train_flags(model: Path, directory: Path) -> list[object]:
    """A run of 8 steps on data written to `directory`, to be followed by what a test changes."""
    train = write_jsonl(directory / "train.jsonl", reviews(24, seed=1))
    validation = write_jsonl(directory / "validation.jsonl", reviews(6, seed=2))
    return [
        "train", "--model", model, "--train", train, "--validation", validation,
        "--template", "{sentence} It was", "--option", " terrible", "--option", " great",
        "--interval", 3, "--eps", 1e-2, "--learning-rate", 1e-2, "--batch-size", 4, "--steps", 8, "--bases", 2,
        "--keep-last",
    ]  # fmt: skip
