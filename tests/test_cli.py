"""`vllm-zo` as a person meets it: help, output, files, exit statuses."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.cli import train_flags, use_engine, vllm_zo, write_jsonl
from tests.conftest import ENVIRONMENT
from tests.engines import Engines, reviews, worker_of
from tests.trajectories import steps_of
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.config import JobConfig, ZOTrainingConfig
from vllm_zo.entrypoints.cli import app as cli
from vllm_zo.entrypoints.cli.flags import train_command, training_options
from vllm_zo.entrypoints.cli.train import job_config
from vllm_zo.entrypoints.llm.callbacks.progress_bar import PLAIN_LINES, ProgressBar
from vllm_zo.errors import ConfigError
from vllm_zo.methods import METHODS, LoZO, MeZOLoRA
from vllm_zo.options import option, options_of

Capture = pytest.CaptureFixture[str]
COMMANDS = {
    "train",
    "check",
    "eval",
    "recipes",
    "keys",
    "serve",
    "status",
    "stop",
    "export",
    "replay",
    "bench",
    "doctor",
}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.fixture(scope="module")
def job(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run that `vllm-zo train` has finished."""
    root = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as ended:
        use_engine(monkeypatch, engines.get())
        cli.main([str(a) for a in [*train_flags(engines.model("opt"), root), "--quiet", "--output", root / "job"]])
    assert not ended.value.code
    return root / "job"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


# --- help -------------------------------------------------------------------------------------------------------------


def test_every_command_and_every_option_is_explained(capsys: Capture) -> None:
    group = typer.main.get_command(cli.app)
    assert set(group.commands) == COMMANDS  # type: ignore[attr-defined]
    shown = vllm_zo(capsys, "--help")
    assert shown.status == 0 and all(f"│ {name} " in shown.out for name in COMMANDS)
    for command in group.commands.values():  # type: ignore[attr-defined]
        assert command.help
        assert all(parameter.help for parameter in command.params), command.name


def test_every_setting_of_a_job_has_a_flag_that_shows_its_default(capsys: Capture) -> None:
    shown = vllm_zo(capsys, "train", "--help").out
    options = {name: setting for owner in (JobConfig, LoZO, MeZOLoRA) for name, setting in options_of(owner).items()}
    for name in options.keys() - {"keep_best", "output_dir"} | {"output", *training_options()}:
        assert f"--{name.replace('_', '-')} " in shown
    for owner, name in ((JobConfig, "learning_rate"), (JobConfig, "steps"), (ZOTrainingConfig, "slot_rank")):
        default = options_of(owner)[name].default
        assert re.search(rf"--{name.replace('_', '-')} .*\(default: {default}\)", shown)
    assert re.search(r"--keep-best +--keep-last .*best evaluation \(default\)", shown)


def test_every_flag_of_the_engine_reaches_it(
    engines: Engines, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: str, zo: ZOTrainingConfig, *_: Any, **__: Any) -> None:
        raise ConfigError(f"given: {zo}")

    monkeypatch.setattr("vllm_zo.entrypoints.cli.train.start_engine", refuse)
    assert set(training_options()) == {"slots", "slot_rank", "kept_states_mib"}
    flags = ["--slots", 4, "--slot-rank", 32, "--kept-states-mib", 7]
    ended = vllm_zo(capsys, *train_flags(engines.model("opt"), tmp_path), *flags, "--output", tmp_path / "job")
    assert f"given: {ZOTrainingConfig(slots=4, slot_rank=32, kept_states_mib=7)}" in ended.err


def test_an_option_of_a_new_part_is_a_flag_without_further_ado(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Shy(LoZO):
        name = "shy"
        shyness: int = option(3, minimum=1, maximum=9, panel="Method", help="How shy it is.")

    monkeypatch.setattr(METHODS, "_registered", dict(METHODS._registered))
    METHODS.register(Shy)
    command = typer.Typer()
    seen: list[Mapping[str, Any]] = []
    command.command()(train_command(seen.append))
    command(["--shyness", "4", "--method", "shy"], standalone_mode=False)
    assert (seen[0]["shyness"], seen[0]["method"], seen[0]["rank"]) == (4, "shy", None)
    with pytest.raises(SystemExit):
        command(["--help"])
    assert re.search(r"--shyness .*How shy it is. \(default: shy: 3\)", capsys.readouterr().out)
    with pytest.raises(ConfigError, match=r"shy\.shyness=10: expected an integer from 1 to 9"):
        METHODS.build("shy", shyness="10")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"{sentence}\nIt was", "{sentence}\nIt was"),
        (r"{sentence}\tIt was", "{sentence}\tIt was"),
        (r"{sentence}\\nabla was", r"{sentence}\nabla was"),
        ("{sentence}\nIt was", "{sentence}\nIt was"),
        (r"C:\Users {sentence}", r"C:\Users {sentence}"),
    ],
)
def test_a_line_feed_typed_in_a_shell_is_one_and_that_is_said(typed: str, meant: str, capsys: Capture) -> None:
    flags = {flag.name: flag.default for flag in inspect.signature(train_command(print)).parameters.values()}
    config = job_config(flags | {"template": typed, "options": [" bad", " good"]}, {})
    assert config.objective.template == meant  # type: ignore[attr-defined]
    assert (r"--template" in capsys.readouterr().err) == (typed != meant)


def test_version_and_an_empty_command_line(capsys: Capture) -> None:
    assert re.fullmatch(r"vllm-zo \d+\.\d+\.\d+\n", vllm_zo(capsys, "--version").out)
    empty = vllm_zo(capsys)
    assert empty.status == 2 and "Usage: vllm-zo" in empty.out + empty.err


# --- train ------------------------------------------------------------------------------------------------------------


def test_training_tells_how_it_goes_and_leaves_an_adapter_and_a_picture(
    engines: Engines, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, engines.get())
    ended = vllm_zo(capsys, *train_flags(engines.model("opt"), tmp_path), "--output", tmp_path / "job")
    job = tmp_path / "job"
    assert ended.status == 0
    numbers = r"loss \d+\.\d{4}, accuracy \d\.\d{3}, [\d.]+ steps/s, 0:\d\d:\d\d left"
    assert re.search(rf"^step 5/8: {numbers}$", ended.err, re.M)
    assert re.search(r"^step 8/8: .* 0:00:00 left\nstep 8: validation loss \d+\.\d{4}, accuracy", ended.err, re.M)
    said = ended.out.splitlines()
    assert said[0].startswith("steps 8, train_loss ") and "initial_accuracy" in said[0]
    assert said[1:] == [
        f"adapter of rank 4: {job / 'adapter'}",
        f"picture: {job / 'run.png'}",
        f"To repeat this run: vllm-zo train {job / 'recipe.yaml'}",
    ]
    assert {path.name for path in (job / "adapter").iterdir()} == {*ADAPTER, "run.png"}
    card = (job / "adapter" / "README.md").read_text()
    for part in (
        "- training: `train.jsonl`, 24 rows",
        "- validation: `validation.jsonl`, 6 rows",
        "| loss | ",
        "](run.png)",
    ):
        assert part in card
    assert str(job) not in card and str(job.parent) not in card
    assert (job / "run.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, *range(1, 9), 8]
    summary = json.loads((job / "summary.json").read_text())
    assert summary["status"] == "succeeded" and summary["metrics"]["loss"] == records[-1]["eval_loss"]


def test_a_ready_made_task_is_trained_and_tested(
    engines: Engines, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, engines.get())
    write_jsonl(tmp_path / "train.jsonl", reviews(520, seed=1))
    write_jsonl(tmp_path / "validation.jsonl", reviews(6, seed=2))
    flags = ["--batch-size", 4, "--steps", 2, "--eval-examples", 4, "--output", tmp_path / "job", "--quiet"]
    task = ["--model", engines.model("opt"), "--task", "sst2", "--data", tmp_path, "--train-examples"]
    for examples, refused in (
        (21, "--train-examples 21: sst2 has 20 besides 500 validation rows; ask for at most 20."),
        (0, "train_examples=0: expected an integer >= 1"),
    ):
        ended = vllm_zo(capsys, "train", *task, examples, *flags)
        assert ended.status == 2 and refused in ended.err
    ended = vllm_zo(capsys, "train", *task, 12, *flags)
    assert ended.status == 0, ended.err
    assert len((tmp_path / "job" / "train.jsonl").read_text().splitlines()) == 12
    metrics = json.loads((tmp_path / "job" / "summary.json").read_text())["metrics"]
    assert metrics["test_accuracy"] * 6 == pytest.approx(round(metrics["test_accuracy"] * 6))
    assert {"loss", "accuracy", "macro_f1", "test_loss", "initial_accuracy"} <= metrics.keys()
    assert f"test_accuracy {metrics['test_accuracy']:.4f}" in ended.out
    last = ended.out.splitlines()[-1]
    assert last.startswith("sst2, 6 test rows, the state that the run gives back: loss ")
    assert f"accuracy {metrics['test_accuracy']:.4f}" in last


def test_a_time_limit_ends_a_run_which_then_is_a_result_like_any_other(
    engines: Engines, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, engines.get())
    flags = [*train_flags(engines.model("opt"), tmp_path), "--steps", 10**6, "--max-seconds", 1]
    ended = vllm_zo(capsys, *flags, "--output", tmp_path / "job")
    assert ended.status == 0, ended.err
    summary = json.loads((tmp_path / "job" / "summary.json").read_text())
    assert 0 < summary["step"] < 10**6 and summary["metrics"]["steps"] == summary["step"]
    last = json.loads((tmp_path / "job" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == summary["step"] and "eval_loss" in last
    assert {path.name for path in (tmp_path / "job" / "adapter").iterdir()} >= ADAPTER


@pytest.mark.parametrize("rate", ["auto", "0.01"])
def test_a_grader_drives_a_run(
    engines: Engines, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, rate: str
) -> None:
    use_engine(monkeypatch, engines.get())
    write_jsonl(tmp_path / "train.jsonl", reviews(12, seed=1))
    grader = {"type": "regex", "name": "has an a", "input": "{{sample.output_text}}", "pattern": "a"}
    (tmp_path / "grader.json").write_text(json.dumps(grader))
    objective = ["--objective", "reward", "--template", "{sentence} It was", "--grader", tmp_path / "grader.json"]
    flags = ["--max-tokens", 3, "--batch-size", 4, "--steps", 3, "--learning-rate", rate, "--quiet"]
    data = ["--model", engines.model("opt"), "--train", tmp_path / "train.jsonl", "--output", tmp_path / "job"]
    ended = vllm_zo(capsys, "train", *data, *objective, *flags)
    assert ended.status == 0, ended.err
    records = [json.loads(line) for line in (tmp_path / "job" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3 and all(record["reward"] == -record["loss"] for record in records)
    assert {record["learning_rate"] for record in records} == {0.0 if rate == "auto" else 0.01}


def test_a_fold_run_leaves_a_merged_model_that_its_log_folds_again(
    engines: Engines, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, job = engines.get(), tmp_path / "job"
    use_engine(monkeypatch, llm)
    fold = ["--bases", 1, "--update-space", "fold", "--quiet", "--output", job]
    ended = vllm_zo(capsys, *train_flags(engines.model("opt"), tmp_path), *fold)
    llm.restore_base(SimpleNamespace(job_id="job"))
    assert ended.status == 0 and f"merged model: {job / 'merged'}" in ended.out and ended.err == ""
    assert "use --merged" in vllm_zo(capsys, "export", job, tmp_path / "adapter").error
    assert vllm_zo(capsys, "replay", job, "--output", tmp_path / "again").status == 0
    trained, again = (load_file(d / "model.safetensors") for d in (job / "merged", tmp_path / "again"))
    base = load_file(engines.model("opt") / "model.safetensors")
    assert all(trained[name].equal(again[name]) for name in base)
    assert not all(trained[name].equal(base[name]) for name in base)


def test_after_ctrl_c_the_same_command_goes_on(
    engines: Engines, job: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """The signal comes in the middle of an engine step, where a process that trains is nearly always."""
    # A shell starts what runs in its background with SIGINT ignored, and Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    llm = engines.get()
    use_engine(monkeypatch, llm)
    trainer = worker_of(llm).zo
    score, calls = trainer.score, []

    def pressed(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)  # at once, in this thread: `os.kill` may be delivered later
        score(*args)

    command = [*train_flags(engines.model("opt"), tmp_path), "--quiet", "--output", tmp_path / "job"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "score", pressed)
        stopped = vllm_zo(capsys, *command)
    assert stopped.status == 130
    assert stopped.error == f"vllm-zo: stopped. To go on: the same command with --resume-from {tmp_path / 'job'}"
    assert 0 < read_seed_log(tmp_path / "job" / "seeds.log").num_steps < 8
    assert vllm_zo(capsys, *command, "--resume-from", tmp_path / "job").status == 0
    assert steps_of(tmp_path / "job") == steps_of(job)
    elsewhere = vllm_zo(capsys, *command, "--output", tmp_path / "b", "--resume-from", tmp_path / "job")
    assert elsewhere.status == 2 and "drop --output" in elsewhere.error


# --- the progress bar -------------------------------------------------------------------------------------------------


def follow(bar: ProgressBar, steps: int, upto: int) -> None:
    run: Any = SimpleNamespace(history=[], engines={})
    for step in range(1, upto + 1):
        run.history.append({"step": step, "loss": 0.5, "accuracy": 0.75})
        bar(run, run.history[-1])
    bar.close()
    bar.close()


@pytest.mark.parametrize("upto", [30, 12], ids=["a whole run", "one that fails"])
def test_a_bar_in_a_terminal_stops_where_the_run_did_and_gives_the_cursor_back(upto: int) -> None:
    screen = io.StringIO()
    follow(ProgressBar(30, Console(file=screen, force_terminal=True, width=120)), 30, upto)
    shown = screen.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.rstrip().rpartition("\r")[2])
    assert f"{upto}/30 loss 0.5000, accuracy 0.750" in last


def test_a_file_gets_a_few_lines_and_always_the_last_step() -> None:
    written = io.StringIO()
    follow(ProgressBar(1001, Console(file=written)), 1001, 1001)
    lines = written.getvalue().splitlines()
    assert len(lines) <= PLAIN_LINES + 1 and lines[-1].startswith("step 1001/1001: loss 0.5000")
    assert "\x1b" not in written.getvalue()


# --- export and replay ------------------------------------------------------------------------------------------------


def test_export_writes_the_adapter_that_training_wrote(job: Path, tmp_path: Path, capsys: Capture) -> None:
    ended = vllm_zo(capsys, "export", job, tmp_path / "adapter")
    assert (ended.status, ended.out) == (0, f"adapter of rank 4, 8 steps: {tmp_path / 'adapter'}\n")
    for name in ADAPTER - {"README.md"}:  # that of `train` has the run's numbers
        assert (tmp_path / "adapter" / name).read_bytes() == (job / "adapter" / name).read_bytes()


def test_export_of_fewer_steps_of_a_lower_rank_or_merged(
    engines: Engines, job: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert "rank 2, 3 steps" in vllm_zo(capsys, "export", job, tmp_path / "early", "--upto", 3).out
    lossy = vllm_zo(capsys, "export", job, tmp_path / "lossy", "--rank", 1)
    assert re.search(r"adapter of rank 1, 8 steps, \d+\.\d\d% of the update's energy discarded", lossy.out)
    assert vllm_zo(capsys, "export", job, tmp_path / "merged", "--merged").status == 0
    merged, base = (load_file(d / "model.safetensors") for d in (tmp_path / "merged", engines.model("opt")))
    assert merged.keys() == base.keys() and not all(merged[name].equal(base[name]) for name in base)


def test_replay_finds_what_the_job_wrote_and_says_when_it_is_not_that(
    engines: Engines, job: Path, tmp_path: Path, capsys: Capture
) -> None:
    same = vllm_zo(capsys, "replay", job, "--output", tmp_path / "adapter")
    assert same.status == 0 and "step 8: equals step-8.safetensors, which the job wrote, bit for bit" in same.out
    weights = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / weights).read_bytes() == (job / "adapter" / weights).read_bytes()

    copy = shutil.copytree(job, tmp_path / "copy")
    stored = copy / "step-8.safetensors"
    tensors = load_file(stored)
    tensors["acc_BN"][0, 0] += 1e-3
    save_file(tensors, stored, metadata=metadata_of(stored))
    differs = vllm_zo(capsys, "replay", copy)
    assert differs.status == 1 and "differs from" in differs.error
    other = vllm_zo(capsys, "replay", job, "--model", engines.model("qwen2"))
    assert other.status == 2 and "is not the model the job trained" in other.error


def metadata_of(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_a_damaged_log_is_used_as_far_as_it_goes_and_that_is_said(job: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = shutil.copytree(job, tmp_path / "copy")
    lines = (copy / "seeds.log").read_bytes().splitlines(keepends=True)
    (copy / "seeds.log").write_bytes(b"".join([*lines[:6], b"5 = nonsense\n", *lines[7:]]))
    note = r"seeds.log, line 7 .*steps 0 to 4 are intact"
    exported = vllm_zo(capsys, "export", copy, tmp_path / "adapter")
    assert exported.status == 0 and re.search(rf"rank 4, 5 steps: .*\n.*{note}", exported.out)
    replayed = vllm_zo(capsys, "replay", copy)
    assert replayed.status == 0 and re.search(note, replayed.out)
    beyond = vllm_zo(capsys, "export", copy, tmp_path / "adapter", "--upto", 6)
    assert beyond.status == 2 and re.search(rf"upto=6: .* holds 5 intact steps. .*{note}", beyond.error)


# --- bench ------------------------------------------------------------------------------------------------------------


def test_bench_hands_its_arguments_and_its_status_through(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def run(command: list[str]) -> Any:
        started.append(command)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(cli.subprocess, "run", run)
    assert vllm_zo(capsys, "bench", "--steps", 5, "--help").status == 3
    assert started[0][2:] == ["--steps", "5", "--help"]
    assert Path(started[0][1]).is_file()
    monkeypatch.setattr(cli, "BENCHMARK", Path("benchmarks") / "not-shipped.py")
    missing = vllm_zo(capsys, "bench")
    assert missing.status == 2 and "clone the repository" in missing.error


# --- wandb ------------------------------------------------------------------------------------------------------------


def test_wandb_gets_every_number_by_step(
    engines: Engines, job: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the three functions of wandb 0.31 that are called."""
    logged: list[dict[str, Any]] = []
    started: list[dict[str, Any]] = []
    finished: list[bool] = []
    fake = ModuleType("wandb")
    wandb_run = SimpleNamespace(
        log=logged.append, finish=lambda: finished.append(True), define_metric=lambda name, step_metric: None
    )
    fake.init = lambda **options: started.append(options) or wandb_run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    use_engine(monkeypatch, engines.get())
    command = [*train_flags(engines.model("opt"), tmp_path), "--quiet", "--wandb", "--output", tmp_path / "job"]
    assert vllm_zo(capsys, *command).status == 0
    assert len(started) == 1 and started[0]["name"] == "job" and started[0]["config"]["steps"] == 8
    assert [row["step"] for row in logged] == [0, *range(1, 9), 8]
    assert {"validation/eval_loss", "validation/eval_accuracy"} < logged[0].keys()
    gradients = [json.loads(line)["coefficients"] for line in (job / "metrics.jsonl").read_text().splitlines()[1:-1]]
    assert [row["train/coefficients"] for row in logged[1:-1]] == [g for [g] in gradients]
    assert finished == [True]


# --- the program itself -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_export_and_replay_as_programs(engines: Engines, tmp_path: Path) -> None:
    def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
        as_users_have_it = {n: v for n, v in os.environ.items() if n not in ENVIRONMENT or n.startswith("HF_")}
        program = Path(sys.executable).with_name("vllm-zo")
        ended = subprocess.run(
            [str(program), *map(str, arguments)], env=as_users_have_it, cwd=tmp_path, text=True, capture_output=True
        )
        assert ended.returncode == 0, ended.stderr
        assert "Traceback" not in ended.stderr
        return ended

    flags = train_flags(engines.model("opt"), tmp_path)
    trained = shell(*flags, "--dtype", "float32", "--max-model-len", 128, "--output", "job")
    job = tmp_path / "job"
    assert f"adapter of rank 4: {job / 'adapter'}\npicture: {job / 'run.png'}\n" in trained.stdout
    assert "job job: LoZO(rank=2, interval=3, eps=0.01, queries=1), 8 steps" in trained.stderr
    assert "update_space=bank: 2 bases of rank 2, an adapter of rank 4" in trained.stderr
    assert "step 8/8: loss" in trained.stderr
    assert shell("export", "job", "exported").stdout == "adapter of rank 4, 8 steps: exported\n"
    assert "equals step-8.safetensors, which the job wrote, bit for bit" in shell("replay", "job").stdout
    weights = "adapter_model.safetensors"
    assert (tmp_path / "exported" / weights).read_bytes() == (job / "adapter" / weights).read_bytes()
