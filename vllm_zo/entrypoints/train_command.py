"""What `vllm-zo train` does: flags to a job, an engine around it, results beside its log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.config import JobConfig, ZOTrainingConfig
from vllm_zo.data import load_examples
from vllm_zo.data.batches import BatchOrder
from vllm_zo.engine.job_dir import read_description
from vllm_zo.entrypoints.cpu_defaults import apply_cpu_defaults, has_native_bfloat16, is_cpu_build
from vllm_zo.entrypoints.engine_options import check_local_model
from vllm_zo.entrypoints.logs import quiet_vllm, show_ours
from vllm_zo.entrypoints.run import Callback, FineTuneRun
from vllm_zo.errors import ConfigError, JobError
from vllm_zo.methods import LoZO
from vllm_zo.methods.spaces import resolve_bases
from vllm_zo.objectives import OBJECTIVES, describe
from vllm_zo.tasks import Task, load_task

Params = Mapping[str, Any]
"""Flags of `cli_train.train` by name; None or an empty list: not given."""

logger = logging.getLogger("vllm.zo.cli")

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended."""
JOB_FLAGS = (
    "learning_rate", "learning_rate_multiplier", "lr_schedule", "warmup_steps", "batch_size", "micro_batches", "steps",
    "seed", "eps_schedule", "max_coefficient", "update_space", "bases", "target_modules", "eval_interval",
    "eval_examples", "checkpoint_interval", "publish_interval", "divergence_factor", "keep_best",
)  # fmt: skip
METHOD_FLAGS = ("rank", "interval", "eps", "queries", "alpha")
PART_FLAGS = ("estimator", "optimizer")
OBJECTIVE_FLAGS = {
    "template": "template", "option": "options", "label": "labels", "label_field": "label_field",
    "choices": "choices", "prompt_field": "prompt_field", "completion_field": "completion_field",
    "reward": "reward", "grader": "grader", "max_tokens": "max_tokens", "stop": "stop", "temperature": "temperature",
    "samples": "samples", "shaping": "shaping",
}  # fmt: skip
"""Flag -> field of the objective."""


def run_training(params: Params) -> None:
    """Everything is checked that can be before the engine is started, which takes a while.

    Raises:
        ConfigError: a setting or the data cannot work.
        JobError: the job failed; its log and last good state are kept.
    """
    resume_from: Path | None = params["resume_from"]
    started = _description(resume_from)
    task = _task(params)
    config = job_config(params, started, task)
    zo = ZOTrainingConfig(**_given(params, ("slots", "slot_rank")))
    resolve_bases(config.method, config.space, config.steps, zo.slot_rank, config.bases)
    model = params["model"] or started.get("model")
    train = task.train if task else params["train"]
    for flag, value in (("--model", model), ("--train", train)):
        if value is None:
            raise ConfigError(f"{flag} is missing: see vllm-zo train --help.")
    validation = task.validation if task else params["validation"]
    BatchOrder(len(load_examples(train, "train")), config.examples_per_step, config.seed)
    if validation is not None:
        load_examples(validation, "validation")
    callbacks = _callbacks(params)
    llm = start_engine(str(model), zo, params)
    directory = Path(resume_from or str(config.output_dir))
    try:
        run = _finetune(llm, config, train, validation, params, callbacks)
        lines = save_results(run, llm.evaluate(task.test, task.final_objective, run=run) if task else {})
    except JobError as error:
        left = f" To use what it learnt: vllm-zo export {directory} OUT"
        raise JobError(f"{error}{left if (directory / 'seeds.log').exists() else ''}") from error
    except KeyboardInterrupt:
        print(f"vllm-zo: stopped. To go on: the same command with --resume-from {directory}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    for line in lines:
        print(line)


def _description(resume_from: Path | None) -> dict[str, Any]:
    if resume_from is None:
        return {}
    if not (resume_from / "job.json").exists():
        raise ConfigError(f"--resume-from {resume_from}: no job.json there; give the directory of an earlier run.")
    return read_description(resume_from)


# --- flags to a job ---------------------------------------------------------------------------------------------------


def _given(params: Params, names: Iterable[str]) -> dict[str, Any]:
    return {name: params[name] for name in names if params[name] not in (None, [], ())}


def _task(params: Params) -> Task | None:
    if params["task"] is None:
        if needless := _given(params, ("data", "data_seed")):
            raise ConfigError(f"{_flags(needless)}: belongs to --task; give --train and --validation files instead.")
        return None
    if double := _given(params, ("train", "validation", "objective", *OBJECTIVE_FLAGS)):
        raise ConfigError(f"{_flags(double)}: --task {params['task']} brings its own; drop one of the two.")
    return load_task(params["task"], params["data"], seed=params["data_seed"] or 0)


def _flags(given: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def job_config(params: Params, started: Mapping[str, Any], task: Task | None = None) -> JobConfig:
    """The job that the flags describe; with --resume-from, `started` (its job.json) fills in what is not given."""
    before: Mapping[str, Any] = started.get("config", {})
    if task is not None:
        objective: dict[str, Any] = describe(task.objective)
    else:
        name = params["objective"] or ("classification" if params["option"] else None)
        if name is None and not before:
            raise ConfigError(f"--objective is missing: {', '.join(OBJECTIVES)}; or --task for a ready-made one.")
        objective = _part(before.get("objective"), name, _objective_settings(params))
    method = params["method"] or (None if before else LoZO.name)
    return JobConfig.from_options(
        {
            **before,
            **_job_settings(params),
            "objective": objective,
            "method": _part(before.get("method"), method, _method_settings(params)),
            "output_dir": _output_dir(params, before),
        }
    )


def _objective_settings(params: Params) -> dict[str, Any]:
    settings = {OBJECTIVE_FLAGS[flag]: value for flag, value in _given(params, OBJECTIVE_FLAGS).items()}
    if len(settings.get("choices", ())) == 1:  # one field that holds the list
        (settings["choices"],) = settings["choices"]
    if "reward" in settings:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it, and the engine's process takes it over
    if "grader" in settings:
        settings["grader"] = _read_grader(settings["grader"])
    return settings


def _read_grader(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--grader {path}: cannot be read as JSON: {error}.") from None


def _job_settings(params: Params) -> dict[str, Any]:
    given = _given(params, JOB_FLAGS)
    with contextlib.suppress(KeyError, ValueError):  # not given, "auto", or for JobConfig to refuse
        given["learning_rate"] = float(given["learning_rate"])
    return given


def _method_settings(params: Params) -> dict[str, Any]:
    parts = {flag: _part_settings(flag, text) for flag, text in _given(params, PART_FLAGS).items()}
    return {**_given(params, METHOD_FLAGS), **parts, **_pairs("--method-option", params["method_option"] or ())}


def _part_settings(flag: str, text: str) -> dict[str, Any]:
    """ "adam:beta1=0.8,beta2=0.99" -> {"name": "adam", "beta1": 0.8, "beta2": 0.99}."""
    name, _, settings = text.partition(":")
    return {"name": name, **_pairs(f"--{flag} {name}:", settings.split(",") if settings else ())}


def _part(before: Mapping[str, Any] | None, name: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Method or objective: as it was, unless another one is named, with what is given on top."""
    same = before is not None and name in (None, before["name"])
    return {**(before if same and before else {"name": name}), **settings}


def _output_dir(params: Params, before: Mapping[str, Any]) -> str | None:
    output: Path | None = params["output"]
    if before:
        if output is not None and output.resolve() != params["resume_from"].resolve():
            raise ConfigError(f"--output {output}: a resumed run stays in its directory; drop --output.")
        return before["output_dir"]
    output = output or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if (output / "seeds.log").exists():
        raise ConfigError(f"--output {output}: holds another run; --resume-from continues it, or choose another.")
    return str(output)


# --- the engine -------------------------------------------------------------------------------------------------------


def start_engine(model: str, zo: ZOTrainingConfig, params: Params) -> Any:
    """vLLM's LLM with training on; its start-up lines are left out.

    Raises:
        ConfigError: an option or the model is refused.
    """
    check_local_model(model, f"--model {model}")
    options = {
        **_given(params, ("dtype", "max_model_len")),
        **_pairs("--engine-option", params["engine_option"] or ()),
    }
    quiet_vllm()
    chosen = apply_cpu_defaults(int(options.get("tensor_parallel_size", 1)))
    from vllm_zo import LLM

    level = logging.WARNING if params["quiet"] else logging.INFO
    show_ours(level)
    if chosen:
        logger.info("on CPU, chosen: %s", ", ".join(f"{name}={value}" for name, value in chosen.items()))
    if is_cpu_build() and not has_native_bfloat16() and options.get("dtype", "auto") != "float32":
        logger.info("this CPU has no bfloat16 instructions: --dtype float32 is faster")
    try:
        llm = LLM(model, zo_training=asdict(zo), use_tqdm_on_load=False, **options)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # vLLM's for a model or an option it does not take
        given = "".join(f", {name}={value!r}" for name, value in options.items())
        raise ConfigError(f"the engine does not start with model={model!r}{given}: {_reason(error)}") from error
    show_ours(level)  # making the engine has reset it
    return llm


def _reason(error: Exception) -> str:
    """The message on one line; of pydantic's report what its checks said, without links and the whole input."""
    from pydantic import ValidationError  # comes with vLLM, which has just been imported

    failed = error.errors() if isinstance(error, ValidationError) else []
    said = "; ".join(": ".join([*map(str, check["loc"]), check["msg"]]) for check in failed) or str(error)
    return " ".join(said.split())


def _pairs(flag: str, pairs: Iterable[str]) -> dict[str, Any]:
    """name=value; values are JSON where they can be read as such, else text."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ConfigError(f"{flag} {pair!r}: expected name=value, e.g. {_EXAMPLES.get(flag, 'beta1=0.9')}.")
        try:
            options[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            options[name.replace("-", "_")] = value
    return options


_EXAMPLES = {"--engine-option": "tensor_parallel_size=2", "--method-option": "rank=4"}


# --- the run ----------------------------------------------------------------------------------------------------------


def _callbacks(params: Params) -> list[Callback]:
    if not params["wandb"]:
        return []
    from vllm_zo.entrypoints.wandb_callback import WandbCallback

    return [WandbCallback()]


def _finetune(
    llm: Any, config: JobConfig, train: Any, validation: Any, params: Params, callbacks: list[Callback]
) -> FineTuneRun:
    options = {f.name: getattr(config, f.name) for f in fields(config)}
    run: FineTuneRun = llm.finetune(
        train,
        validation,
        resume_from=params["resume_from"],
        callbacks=callbacks,
        progress=not params["quiet"],
        **options,
    )
    return run


def save_results(run: FineTuneRun, test: Mapping[str, float]) -> list[str]:
    """The adapter (`bank`) or the merged model (`fold`), `run.png`, and the numbers into `summary.json`.

    Returns:
        What was written, a line each.
    """
    metrics = run.metrics | {f"test_{name}": value for name, value in test.items()}
    lines = [", ".join(f"{name} {_short(value)}" for name, value in metrics.items())]
    if run.history or run.config.steps:
        lines.append(_save_model(run))
    try:
        run.plot(run.directory / "run.png")
        lines.append(f"picture: {run.directory / 'run.png'}")
    except (ConfigError, OSError) as error:  # matplotlib is optional, and a full disk costs the picture only
        lines.append(f"no picture: {error}")
    path = run.directory / "summary.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_atomically(path, json.dumps(before | {"metrics": metrics}, indent=1).encode())
    return lines


def _save_model(run: FineTuneRun) -> str:
    if run.config.space == "fold":
        run.save_merged(run.directory / "merged")
        return f"merged model: {run.directory / 'merged'}"
    report = run.save(run.directory / "adapter")
    return "\n".join([f"adapter of rank {report.rank}: {report.directory}", *report.warnings])


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
