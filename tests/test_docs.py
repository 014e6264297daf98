"""README and docs/ against the code: what they name exists, their snippets run, and their sentence on imports is the
contract that lint checks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from vllm_zo.entrypoints.cli.app import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PLACES = ("", "vllm_zo", "docs", "tests", "benchmarks")
"""Where a page may mean a path such as `worker/cpu/lora.py` to start."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them: lower case, without punctuation, spaces as hyphens."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert not anchor or anchor in headings(file), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|sh|html|patch|toml))\b", page.read_text())
    missing = [path for path in named if not any((ROOT / place / path).exists() for place in PLACES)]
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_python_block_is_python(page: Path) -> None:
    for block in code_blocks(page, "python"):
        compile(block.replace(", ...)", ")"), name(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_flag_of_a_command_exists(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for block in code_blocks(page, ""):
        for command, arguments in re.findall(r"^vllm-zo (\w+)(.*)$", block.replace("\\\n", " "), flags=re.MULTILINE):
            group = getattr(commands[command], "commands", {})  # of `vllm-zo keys`: the next word is the command
            params = group[arguments.split()[0]].params if group else commands[command].params
            known = {flag for option in params for flag in (*option.opts, *option.secondary_opts)}
            if command not in ("serve", "bench"):  # their arguments are another program's
                flags = re.findall(r"(?<=\s)--[\w-]+", arguments.partition("#")[0])
                assert known.issuperset(flags), set(flags) - known


def test_the_sentence_on_imports_is_the_contract_that_lint_checks() -> None:
    (sentence,) = re.findall(r"Imports go one way: `(.*?)`", README.read_text(), flags=re.DOTALL)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rooms, front = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    single_files = {"plugin", "vllm_plugin"}  # what vLLM loads: above everything, and not a room
    floors = [f"entrypoints.{floor}" for floor in front if floor not in single_files]
    floors += [floor for floor in rooms if floor not in {*single_files, "entrypoints"}]
    assert [set(re.findall(r"[\w.]+", floor)) for floor in sentence.split("->")] == [
        set(re.findall(r"[\w.]+", floor)) for floor in floors
    ]


def test_every_promise_of_security_names_a_test_that_is_there() -> None:
    section = (ROOT / "docs" / "server.md").read_text().partition("\n## Security\n")[2].partition("\n## ")[0]
    promises = [" ".join(promise.split()) for promise in section.split("\n- ")[1:]]
    assert len(promises) > 15
    for promise in promises:
        named = re.findall(r"`(test_\w+\.py)`((?:,? (?:and )?\*\w+\*)+)", promise)
        assert named or promise.startswith("vLLM's development mode"), promise
        for file, words in named:
            tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), flags=re.MULTILINE)
            for word in re.findall(r"\*(\w+)\*", words):
                assert any(word in test for test in tests), (file, word)


@pytest.mark.slow
def test_the_first_snippet_of_the_readme_runs_as_printed(tmp_path: Path) -> None:
    snippet = code_blocks(README, "python")[0]
    assert "steps=400" in snippet
    (tmp_path / "snippet.py").write_text(snippet.replace("steps=400", "steps=6"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, "snippet.py"], cwd=tmp_path, env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert re.search(r"^0\.\d+$", done.stdout, flags=re.MULTILINE)
    assert (tmp_path / "run.png").exists()
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
