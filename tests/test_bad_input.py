"""What cannot work is refused before work starts, or ends with the state saved; each time a person is told what to do.

Bad settings, data and logs alone: test_config.py, test_data.py, test_seed_log.py. Here they meet commands and engines.
`/dev/full` is a disk without space: a link to it where a file is about to be written makes that write fail.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GPT2Config
from vllm import platforms
from vllm.lora.request import LoRARequest

from tests.cli import train_flags, use_engine, vllm_zo, write_jsonl
from tests.engines import SENTIMENT, Engines, reviews, scheduler_of
from tests.trajectories import STEPS, Trajectory, cut_copy, steps_of, train
from vllm_zo import LLM, ConfigError, CorruptLogError, JobError, LoZO
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.entrypoints.cli import train as train_command
from vllm_zo.entrypoints.llm.options import engine_options

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def unbroken(engines: Engines) -> tuple[Any, Trajectory]:
    run = train(engines.get())
    return run, Trajectory.of(engines.get(), run)


def assert_serves(llm: Any) -> None:
    assert llm.generate(["the story is"], use_tqdm=False)[0].outputs[0].token_ids


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'.*train"),
        (["train", "--learning-rat", "1"], "No such option: --learning-rat .*--learning-rate"),
        (["train", "--steps", "many"], "Invalid value for '--steps': .*integer"),
        (["train", "--eps", "tiny"], "Invalid value for '--eps': .*(number|float)"),
        (["train", "--rank"], "Option '--rank' requires an argument"),
        (["export", "somewhere"], "Missing argument 'OUT'"),
        (["replay", "somewhere", "--upto", "1.5"], "Invalid value for '--upto': .*integer"),
    ],
)
def test_a_command_line_that_does_not_parse_is_status_2_with_the_flag(
    capsys: Capture, arguments: list[str], message: str
) -> None:
    ended = vllm_zo(capsys, *arguments)
    assert ended.status == 2
    assert re.search(message, ended.err) and "Traceback" not in ended.err


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(train_command, "start_engine", start)


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eps", 0], "lozo.eps=0.0: expected a number > 0; LoZO and MeZO use 1e-3."),
        (["--eps", "nan"], "lozo.eps=nan: expected a number > 0"),
        (["--rank", 0], "lozo.rank=0: expected an integer from 1 to 512"),
        (
            ["--rank", 9],
            "lozo.rank=9 and slot_rank=16: a slot holds an accumulator and a probe, 18 in all; set rank <=",
        ),
        (["--interval", 0], "lozo.interval=0: expected an integer >= 1"),
        (["--queries", 0], "lozo.queries=0: expected an integer >= 1"),
        (
            ["--bases", 99],
            "bases=99 with lozo.rank=2 and slot_rank=16: expected at most 7; for more, set slot_rank=256.",
        ),
        (["--slots", 1], "zo_training.slots=1: expected an integer >= 2; a pair of probes needs 2."),
        (["--slot-rank", 24], "zo_training.slot_rank=24: expected one of 1, 8, 16"),
        (["--batch-size", 25], "batch_size=25: the training data has 24 examples; use a smaller batch or more data."),
        (["--learning-rate", -1], "learning_rate=-1: expected a number >= 0; 'auto' finds one."),
        (["--steps", -1], "steps=-1: expected an integer >= 0."),
        (["--method", "lozoo"], "unknown method 'lozoo': did you mean 'lozo'?"),
        (["--method", "factorized-mezo", "--interval", 3], "unknown setting of method factorized-mezo 'interval'"),
        (["--update-space", "folds"], "unknown update_space 'folds': did you mean 'fold'?"),
        (["--task", "sst2"], "--train, --validation, --template, --option: --task sst2 brings its own; drop one"),
        (["--data", "a"], "--data: belongs to --task"),
        (["--train-examples", 9], "--train-examples: belongs to --task"),
        (["--objective", "language-modelling"], "unknown objective 'language-modelling': did you mean 'language-model"),
        (["--template", "no field"], "template='no field'"),
        (["--train", "nowhere.jsonl"], "train='nowhere.jsonl': no such file"),
        (["--validation", "rows.txt"], "validation='rows.txt': expected a file that ends in .jsonl, .json, .csv"),
        (["--chat-template", "nowhere.jinja"], "--chat-template nowhere.jinja: no such file (looked in "),
        (["--default-chat-template-kwargs", "shout"], "--default-chat-template-kwargs 'shout': cannot be read as JSON"),
        (
            ["--resume-from", "nowhere"],
            "--resume-from nowhere: no job.json there; give the directory of an earlier run",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_cannot_work_are_refused_before_an_engine_starts(
    capsys: Capture, tmp_path: Path, flags: list[object], message: str
) -> None:
    output = [] if "--resume-from" in flags else ["--output", tmp_path / "job"]
    bases = ["--bases", 1] if "--bases" not in flags else []
    ended = vllm_zo(capsys, *train_flags(Path("model"), tmp_path), *bases, *output, *flags)
    assert ended.status == 2
    assert message in ended.error
    assert not (tmp_path / "job").exists()


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "sst-2"], "unknown task 'sst-2': did you mean 'sst2'"),
        (["--task", "sst2", "--data", "nowhere"], "data='nowhere': no such directory"),
    ],
)
def test_a_task_that_is_not_there_is_refused_before_an_engine_starts(
    capsys: Capture, flags: list[object], message: str
) -> None:
    ended = vllm_zo(capsys, "train", "--model", "model", *flags)
    assert ended.status == 2 and message in ended.error


@pytest.mark.usefixtures("no_engine")
def test_what_is_missing_or_taken_is_named_before_an_engine_starts(capsys: Capture, tmp_path: Path) -> None:
    command = train_flags(Path("model"), tmp_path)
    without_model = [command[0], *command[3:]]
    assert "--model is missing" in vllm_zo(capsys, *without_model).error
    assert "--objective is missing: classification" in vllm_zo(capsys, "train", "--model", "m").error
    (tmp_path / "seeds.log").touch()
    assert "holds another run; --resume-from continues it" in vllm_zo(capsys, *command, "--output", tmp_path).error


@pytest.mark.usefixtures("no_engine")
def test_a_missing_wandb_is_named_with_its_remedy_before_an_engine_starts(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    ended = vllm_zo(capsys, *train_flags(Path("model"), tmp_path), "--wandb")
    assert ended.status == 2 and "wandb is not installed: pip install 'vllm-zo[wandb]'" in ended.error


def test_a_job_that_is_not_there_is_named(capsys: Capture, tmp_path: Path) -> None:
    for command in (["export", tmp_path, tmp_path / "out"], ["replay", tmp_path]):
        ended = vllm_zo(capsys, *command)
        assert ended.status == 2
        assert "No such file or directory; give the directory of a job that has run" in ended.error


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture
def unpublished_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """`start_engine` sets up environment and logging for a program of its own; a test process has its own."""
    for name in ("quiet_vllm", "apply_cpu_defaults", "show_ours"):
        monkeypatch.setattr(train_command, name, lambda *_: {})


@pytest.mark.usefixtures("unpublished_settings")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "float99"], r"does not start with model='\S+opt', dtype='float99': .*'bfloat16'"),
        (["--engine-option", "max_loraz=3"], r"max_loraz=3: .*unexpected keyword argument 'max_loraz'"),
        (["--engine-option", "max_loras"], r"--engine-option 'max_loras': expected name=value"),
        (["--engine-option", "max-num-seqs=1"], r"max_num_seqs=1 with zo_training: .*set max_num_seqs >= 2"),
        (["--model", "./nowhere"], r"--model ./nowhere: no such directory"),
    ],
)
def test_an_engine_that_cannot_start_says_why_in_one_line(
    engines: Engines, capsys: Capture, tmp_path: Path, flags: list[object], message: str
) -> None:
    ended = vllm_zo(capsys, *train_flags(engines.model("opt"), tmp_path), "--output", tmp_path / "job", *flags)
    assert ended.status == 2
    assert re.search(message, ended.error) and "pydantic.dev" not in ended.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_parallel_size": 2}, "data_parallel_size=2 with zo_training: .*set data_parallel_size=1"),
        ({"max_num_seqs": 1}, "max_num_seqs=1 with zo_training: a pair of probes runs together; set max_num_seqs >= 2"),
        ({"worker_cls": "a.B"}, "worker_cls='a.B' with zo_training: training brings its own; leave worker_cls unset"),
        ({"scheduler_cls": "a.B"}, "scheduler_cls='a.B' with zo_training: .* leave scheduler_cls unset"),
        ({"fully_sharded_loras": True}, "fully_sharded_loras=True with zo_training: .*set it to False"),
        ({"speculative_config": {"method": "ngram"}}, "speculative decoding with zo_training: .*start without it"),
        ({"enable_lora": False}, "enable_lora=False with zo_training: .* leave enable_lora unset"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_engine_options_that_training_cannot_work_with_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_options("a model that is never looked at", True, options)


def test_stages_are_refused_on_a_gpu_as_long_as_nobody_has_tried_them_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(is_cpu=lambda: False, is_cuda_alike=lambda: True, device_type="cuda")
    for check in ("check_vllm", "require_patches"):  # they look for what a CUDA build has
        monkeypatch.setattr(f"vllm_zo.entrypoints.llm.options.{check}", lambda: None)
    monkeypatch.setattr(platforms, "current_platform", gpu)
    with pytest.raises(ConfigError, match="pipeline_parallel_size=2 with zo_training: it was tried on CPU builds only"):
        engine_options("a model that is never looked at", True, {"pipeline_parallel_size": 2})


def test_a_model_without_lora_support_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    GPT2Config(architectures=["GPT2LMHeadModel"], n_embd=32, n_layer=1, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no LoRA support .* choose a model of a supported"):
        LLM(str(tmp_path), zo_training=True, skip_tokenizer_init=True)


def test_fold_on_a_quantised_base_is_refused(engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the name of the scheme is set: vLLM on CPU cannot put LoRA on the int8 layers it has."""
    llm = engines.get()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler_of(llm).vllm_config.model_config, "quantization", "awq")
        with pytest.raises(
            ConfigError, match=r"update_space='fold' .* quantised \(awq\): train with update_space='bank'"
        ):
            train(llm, "fold", output_dir=str(tmp_path / "job"))
    assert not (tmp_path / "job" / "seeds.log").exists()
    assert_serves(llm)


# --- data and jobs ----------------------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_data_and_bad_rows_leave_nothing_behind(engines: Engines, tmp_path: Path) -> None:
    llm, directory = engines.get(), tmp_path / "job"
    job: dict[str, Any] = {"objective": SENTIMENT, "output_dir": str(directory), "steps": 2, "progress": False}
    with pytest.raises(ConfigError, match="batch_size=16: the training data has 5 .*lower batch_size"):
        llm.finetune(reviews(5), **job)
    rows = write_jsonl(tmp_path / "rows.jsonl", [*reviews(3), {"sentence": "no label"}])
    with pytest.raises(ConfigError, match=r"rows.jsonl, row 4: .*label"):
        llm.finetune(rows, batch_size=2, **job)
    with pytest.raises(ConfigError, match=r"bases=8 with lozo.rank=2 and slot_rank=16: expected at most 7"):
        llm.finetune(reviews(5), batch_size=2, bases=8, **job)
    with pytest.raises(ConfigError, match=r"lozo.rank=9 and slot_rank=16: .* set rank <= 8"):
        llm.finetune(reviews(5), batch_size=2, method=LoZO(rank=9), **job)
    assert not directory.exists()


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_resuming_with_another_model_dtype_or_slot_rank_is_refused_before_anything_is_touched(
    engines: Engines, unbroken: tuple[Any, Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = cut_copy(unbroken[0].directory, tmp_path / "cut", 5)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(ConfigError, match=r"base_model='\S+qwen2' .* not the model the job trained, '\S+opt' "):
        train(engines.get("qwen2"), resume_from=directory)
    with pytest.raises(ConfigError, match=r"dtype='bfloat16': the run in \S+ was made in 'float32'; start the engine"):
        train(engines.get(dtype="bfloat16"), resume_from=directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before

    llm = engines.get()
    many = llm.finetune(
        reviews(24), objective=SENTIMENT, method=LoZO(interval=1), batch_size=2, steps=6, progress=False
    )
    monkeypatch.setitem(llm.llm_engine.vllm_config.additional_config["zo_training"], "slot_rank", 8)
    with pytest.raises(ConfigError, match=r"slot_rank=8: gives 3 bases, the run in \S+ has 6; start the engine with"):
        llm.finetune(
            reviews(24), objective=SENTIMENT, method=LoZO(interval=1), batch_size=2, steps=6, resume_from=many.directory
        )


def test_a_log_damaged_in_the_middle_is_used_up_to_there(
    engines: Engines, unbroken: tuple[Any, Trajectory], tmp_path: Path
) -> None:
    llm, (run, expected) = engines.get(), unbroken
    directory = cut_copy(run.directory, tmp_path / "cut", STEPS)
    offset = read_seed_log(directory / "seeds.log").offsets[4] + 3
    data = bytearray((directory / "seeds.log").read_bytes())
    data[offset] ^= 1
    (directory / "seeds.log").write_bytes(data)
    resumed = train(llm, resume_from=directory)
    assert [record["step"] for record in resumed.history] == list(range(5, STEPS + 1))
    assert Trajectory.of(llm, resumed) == expected


def test_a_log_without_its_head_is_refused_and_left_as_it_is(
    engines: Engines, unbroken: tuple[Any, Trajectory], tmp_path: Path, capsys: Capture
) -> None:
    directory = cut_copy(unbroken[0].directory, tmp_path / "cut", 5)
    damaged = (directory / "seeds.log").read_bytes().replace(b"lozo", b"loso", 1)
    (directory / "seeds.log").write_bytes(damaged)
    with pytest.raises(CorruptLogError, match=r"seeds.log: damaged header .*No step can be rebuilt from it; use a "):
        train(engines.get(), resume_from=directory)
    for command in (["replay", directory], ["export", directory, tmp_path / "out"]):
        ended = vllm_zo(capsys, *command)
        assert ended.status == 1 and "damaged header" in ended.error
    assert (directory / "seeds.log").read_bytes() == damaged


# --- a full disk ------------------------------------------------------------------------------------------------------

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


def full_disk_at(path: Path) -> Path:
    """Writing `path` atomically (beside it, then renamed) will find no space, once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    temporary.symlink_to("/dev/full")
    return temporary


@pytest.fixture
def our_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What a terminal sees of the logs: vLLM's loggers do not propagate to where pytest listens."""
    logger = logging.getLogger("vllm.zo")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@needs_dev_full
@pytest.mark.parametrize("file", ["snapshot.safetensors", "step-4.safetensors"])
def test_a_full_disk_at_a_snapshot_or_a_version_costs_that_file_only(
    engines: Engines, unbroken: tuple[Any, Trajectory], tmp_path: Path, our_log: pytest.LogCaptureFixture, file: str
) -> None:
    llm, directory = engines.get(), tmp_path / "job"
    full_disk_at(directory / file)
    run = train(llm, checkpoint_interval=4, publish_interval=4, output_dir=str(directory))
    assert f"{file}: No space left" in our_log.text and all(record.exc_info is None for record in our_log.records)
    assert run.status == "succeeded" and (4 in run.published) == (file == "snapshot.safetensors")
    assert Trajectory.of(llm, run).steps == unbroken[1].steps


class Disk:
    """`os.pwrite` of a disk that is full until it has refused `times` writes to files of one name."""

    def __init__(self, name: str, times: int) -> None:
        self.name, self.times = name, times
        self._pwrite = os.pwrite

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        if self.times and os.readlink(f"/proc/self/fd/{descriptor}").endswith(self.name):
            self.times -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._pwrite(descriptor, data, offset)


@pytest.mark.parametrize("file", ["metrics.jsonl", "seeds.log"])
def test_a_job_waits_for_a_full_disk_and_loses_nothing(
    engines: Engines, unbroken: tuple[Any, Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    our_log: pytest.LogCaptureFixture, file: str,
) -> None:  # fmt: skip
    llm, directory = engines.get(), tmp_path / "job"
    monkeypatch.setattr(os, "pwrite", Disk(file, times=2).pwrite)
    run = train(llm, output_dir=str(directory))
    assert f"waits: {directory / file}: No space left on device with" in our_log.text
    assert run.status == "succeeded" and Trajectory.of(llm, run) == unbroken[1]
    assert_serves(llm)


def test_a_job_that_waits_for_a_full_disk_says_so_serves_and_can_be_cancelled(
    engines: Engines, unbroken: tuple[Any, Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, directory = engines.get(), tmp_path / "job"
    seen: list[str] = []

    def cancel_once_it_waits(run: Any, record: Any) -> None:
        while not run.waits_for:
            llm.llm_engine.step()
            run.poll()
        seen.append(run.waits_for)
        assert_serves(llm)
        run.cancel()

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", Disk("seeds.log", times=10**9).pwrite)
        with pytest.raises(JobError, match="cancelled"):
            train(llm, output_dir=str(directory), callbacks=[cancel_once_it_waits])
    assert "seeds.log: No space left on device with" in seen[0]
    assert json.loads((directory / "summary.json").read_text())["status"] == "cancelled"
    assert_serves(llm)
    assert Trajectory.of(llm, train(llm, resume_from=directory)) == unbroken[1]


@needs_dev_full
def test_a_summary_that_does_not_fit_costs_the_summary_only(
    engines: Engines, unbroken: tuple[Any, Trajectory], tmp_path: Path, our_log: pytest.LogCaptureFixture
) -> None:
    llm, directory = engines.get(), tmp_path / "job"
    full_disk_at(directory / "summary.json")
    run = train(llm, output_dir=str(directory))
    assert run.status == "succeeded" and Trajectory.of(llm, run) == unbroken[1]
    assert "summary.json: No space left on device" in our_log.text
    assert not (directory / "summary.json").exists()


def test_a_directory_that_cannot_be_written_is_named_before_the_job_starts(engines: Engines, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        JobError, match=r"cannot write \S+train.jsonl: (Not a directory|File exists).*or choose another directory"
    ):
        train(engines.get(), output_dir=str(tmp_path / "file" / "job"))
    assert_serves(engines.get())


@needs_dev_full
def test_results_that_do_not_fit_can_be_exported_later(
    engines: Engines, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(monkeypatch, engines.get())
    job = tmp_path / "job"
    command = [*train_flags(engines.model("opt"), tmp_path), "--quiet", "--output", job]
    temporary = full_disk_at(job / "adapter" / "adapter_model.safetensors")
    ended = vllm_zo(capsys, *command)
    assert ended.status == 1 and not temporary.is_symlink()
    assert "adapter_model.safetensors: No space left on device" in ended.error
    assert ended.error.endswith(f"To use what it learnt: vllm-zo export {job} OUT")
    assert vllm_zo(capsys, "export", job, tmp_path / "adapter").status == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()

    job = tmp_path / "again"
    job.mkdir()
    (job / "run.png").symlink_to("/dev/full")
    ended = vllm_zo(capsys, *command[:-1], job)
    assert ended.status == 0 and "no picture: [Errno 28] No space left on device" in ended.out
    assert steps_of(job) == steps_of(tmp_path / "job")


def test_evaluating_a_state_that_is_not_on_disk_is_refused_and_not_answered_with_the_base(
    engines: Engines, unbroken: tuple[Any, Trajectory]
) -> None:
    llm, run = engines.get(), unbroken[0]
    kept = run.version_file.rename(run.version_file.with_suffix(".kept"))
    try:
        with pytest.raises(ConfigError, match=r"step-10.safetensors: there is no file of this state"):
            llm.evaluate(reviews(4), run=run)
    finally:
        kept.rename(run.version_file)
    assert llm.evaluate(reviews(4), run=run)["loss"] > 0


@pytest.mark.parametrize("damage", ["cut off", "no header", "no configuration", "gone"])
def test_a_damaged_adapter_costs_its_own_request_only(engines: Engines, tmp_path: Path, damage: str) -> None:
    llm = engines.get()
    train(llm, output_dir=str(tmp_path / "job")).save(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    adapter = LoRARequest(f"adapter-{damage}", 77 + len(damage), str(tmp_path / "adapter"))
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no header":
        weights.write_bytes(b"x" * 1000)
    elif damage == "no configuration":
        (tmp_path / "adapter" / "adapter_config.json").unlink()
    else:
        shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="adapter_model.safetensors .* is damaged|no adapter_config.json there"):
        llm.generate(["the story is"], use_tqdm=False, lora_request=adapter)
    assert_serves(llm)
