"""`vllm-zo train`: makes a job of the flags, starts an engine for it, and writes the results beside its log."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any

from vllm_zo.checkpoint.files import write_atomically
from vllm_zo.config import JobConfig, ZOTrainingConfig
from vllm_zo.data import load_examples
from vllm_zo.data.batches import BatchOrder
from vllm_zo.data.load import Examples
from vllm_zo.entrypoints.cli.flags import (
    PARTS,
    flag_of,
    job_options,
    method_options,
    objective_options,
    training_options,
)
from vllm_zo.entrypoints.cli.hub import check_hub, push
from vllm_zo.entrypoints.cli.model_card import CURVE, Card
from vllm_zo.entrypoints.cli.recipes.packaged import packaged_file
from vllm_zo.entrypoints.cli.recipes.recipe import (
    EMPTY,
    OF_A_TASK,
    RUN,
    Recipe,
    read_recipe,
    repeated_by,
    resolved_recipe,
)
from vllm_zo.entrypoints.cli.terminal_logging import quiet_vllm, show_ours
from vllm_zo.entrypoints.llm.callbacks.report import report_to
from vllm_zo.entrypoints.llm.cpu_defaults import apply_cpu_defaults, has_native_bfloat16, is_cpu_build
from vllm_zo.entrypoints.llm.handle import FineTuneRun
from vllm_zo.entrypoints.llm.options import check_local_model, world_size_of
from vllm_zo.errors import ConfigError, JobError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.methods import LoZO
from vllm_zo.objectives import OBJECTIVES, Classification
from vllm_zo.registry import describe
from vllm_zo.slot_fit import resolve_bases
from vllm_zo.tasks import TRAIN, Task, load_task
from vllm_zo.validation import check_optional_int

Params = Mapping[str, Any]
"""Flags by name (flags.py). None or an empty list: the user did not give the flag."""

logger = logging.getLogger("vllm.zo.cli")

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended, as shells have it: 128 + SIGINT."""
TYPED_ESCAPE = re.compile(r"\\(\\?)([nt])")
ESCAPES = {"n": "\n", "t": "\t"}


@dataclass(frozen=True)
class Plan:
    """A run as flags and recipe describe it, checked as far as is possible without an engine.

    Attributes:
        params: the flags, with what the recipe gives where they are silent.
        engine: options of vLLM's LLM.
        chat: how chats are rendered, as for `finetune`.
    """

    params: Params
    recipe: Recipe
    config: JobConfig
    zo: ZOTrainingConfig
    engine: dict[str, Any]
    task: Task | None
    train: Examples
    validation: Examples | None
    chat: dict[str, Any]

    @property
    def model(self) -> str:
        return str(self.params["model"])

    @property
    def resume_from(self) -> Path | None:
        directory: Path | None = self.params["resume_from"]
        return directory

    @property
    def trackers(self) -> Iterator[str]:
        """Where the numbers go, as for `report_to`."""
        given = self.params["report_to"] or ()
        yield from [given] if isinstance(given, str) else given
        if self.params["wandb"]:
            yield "wandb"

    @property
    def data(self) -> dict[str, tuple[str, int]]:
        """Parts of the data: where each is from, and its rows."""
        parts = {"training": self.train, "validation": self.validation}
        of_task = {} if self.task is None else {"test": (f"task {self.task.name}", len(self.task.test))}
        named = {part: (rows.source, len(rows)) for part, rows in parts.items() if rows is not None}
        return (
            {part: (f"task {self.task.name}", rows) for part, (_, rows) in named.items()} if self.task else named
        ) | of_task

    def recipe_text(self, where: Path) -> str:
        """The recipe that repeats the run, for the file `where`."""
        return resolved_recipe(self.params, self.config, self.zo, self.engine, where)


def plan_run(params: Params) -> Plan:
    """Read flags, recipe and data.

    Raises:
        ConfigError: a setting or the data cannot work.
    """
    recipe = _recipe(params)
    params = {**params, **recipe.run, **_given(params, RUN)}
    started = _description(params["resume_from"])
    task = _task(params)
    config = job_config(params, started, task, recipe)
    zo = ZOTrainingConfig(**{**recipe.zo, **_given(params, training_options())})
    # For its errors only: whether the method fits into the slots is known without an engine.
    resolve_bases(config.method, config.space, config.steps, zo.slot_rank, config.bases)
    params["model"] = params["model"] or started.get("model")
    train = task.train if task else params["train"]
    validation = task.validation if task else params["validation"]
    for flag, value in (("--model", params["model"]), ("--train", train)):
        if value is None:
            raise ConfigError(f"{flag} is missing: see vllm-zo train --help.")
    train = load_examples(train, "train")
    # For its errors only: the batch may be larger than the data. A chat may give several examples.
    if not any("messages" in record for record in train):
        BatchOrder(len(train), config.examples_per_step, config.seed)
    chat = _chat(params)
    validation = None if validation is None else load_examples(validation, "validation")
    config.check_evaluates(validation is not None)
    return Plan(params, recipe, config, zo, _engine_options(params, recipe), task, train, validation, chat)


def _recipe(params: Params) -> Recipe:
    """The recipe in the file that is given, or the packaged one that --recipe names, under the flags."""
    file, name = params["recipe"], params["packaged_recipe"]
    if name is not None:
        if file is not None:
            raise ConfigError(f"--recipe {name}: {file} is a recipe already; give one of them.")
        file = packaged_file(name)
    return EMPTY if file is None else read_recipe(file).under(params)


def run_training(params: Params) -> None:
    """Train as the flags say. It checks as much as it can before it starts the engine, which takes a while.

    Raises:
        ConfigError: a setting or the data cannot work.
        JobError: the job failed; its log and last good state are kept.
        SystemExit: Ctrl-C was pressed; the exit status is INTERRUPTED.
    """
    plan = plan_run(params)
    config, task, quiet = plan.config, plan.task, bool(plan.params["quiet"])
    # Before the engine starts: the library of a tracker may be missing, or the login of the hub.
    reports = report_to([*plan.trackers])
    if (hub := plan.params["push_to_hub"]) is not None:
        check_hub(hub)
    directory = Path(plan.resume_from or str(config.output_dir))
    recipe = JobDir(directory).recipe
    kept = KeptRecipe(recipe, plan.recipe_text(recipe))
    with engines_of(plan) as llm:
        try:
            run: FineTuneRun = llm.finetune(
                plan.train,
                plan.validation,
                config=config,
                resume_from=plan.resume_from,
                chat=plan.chat,
                callbacks=[kept, *reports],
                progress=not quiet,
            )
            test = llm.evaluate(task.test, task.final_objective, run=run) if task else {}
            lines, saved = save_results(run, plan, test)
            lines.append(kept.command())
            if task:
                shown = ", ".join(f"{name} {_short(value)}" for name, value in test.items())
                lines.append(f"{task.name}, {len(task.test)} test rows, the state that the run gives back: {shown}")
        except JobError as error:
            left = f" To use what it learnt: vllm-zo export {directory} OUT"
            raise JobError(f"{error}{left if JobDir(directory).log.exists() else ''}") from error
        except KeyboardInterrupt:
            print(f"vllm-zo: stopped. To go on: the same command with --resume-from {directory}", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
    for line in lines:
        print(line)
    if hub is not None and saved is not None:
        print(push(saved, hub))


def _description(resume_from: Path | None) -> dict[str, Any]:
    if resume_from is None:
        return {}
    directory = JobDir(resume_from)
    if not directory.description.exists():
        raise ConfigError(f"--resume-from {resume_from}: no job.json there; give the directory of an earlier run.")
    description: dict[str, Any] = json.loads(directory.description.read_text(encoding="utf-8"))
    return description


# --- flags to a job ---------------------------------------------------------------------------------------------------


def _given(params: Params, names: Iterable[str]) -> dict[str, Any]:
    return {name: params[name] for name in names if params[name] not in (None, [], ())}


def _task(params: Params) -> Task | None:
    if params["task"] is None:
        if needless := _given(params, OF_A_TASK[1:]):
            raise ConfigError(f"{_flags(needless)}: belongs to --task; give --train and --validation files instead.")
        return None
    if double := _given(params, ("train", "validation", "objective", "objective_option", *objective_options())):
        raise ConfigError(f"{_flags(double)}: --task {params['task']} brings its own; drop one of the two.")
    asked = params["train_examples"]
    check_optional_int("train_examples", asked, 1)
    count = TRAIN if asked is None else asked
    task = load_task(params["task"], params["data"], seed=params["data_seed"] or 0, train=count)
    if asked is not None and len(task.train) < asked:
        raise ConfigError(
            f"--train-examples {asked}: {task.name} has {len(task.train)} besides {len(task.validation)} validation "
            f"rows; ask for at most {len(task.train)}."
        )
    return task


def _flags(given: Iterable[str]) -> str:
    return ", ".join(map(flag_of, given))


def job_config(
    params: Params,
    started: Mapping[str, Any],
    task: Task | None = None,
    recipe: Recipe = EMPTY,
) -> JobConfig:
    """The job that the flags describe. The recipe fills in what no flag says, and with --resume-from the job's own
    job.json (`started`) what neither says.

    Raises:
        ConfigError: a value is out of range, flags contradict each other, or the objective is missing.
    """
    job: Mapping[str, Any] = started.get("config", {})
    given = recipe.config
    before = {**job, **given, **{kind: _over(job.get(kind), given.get(kind)) for kind in ("objective", "method")}}
    if task is not None:
        objective: dict[str, Any] = describe(task.objective)
    else:
        name = params["objective"] or (Classification.name if params["options"] else None)
        if name is None and before["objective"] is None:
            raise ConfigError(f"--objective is missing: {', '.join(OBJECTIVES)}; or --task for a ready-made one.")
        objective = _loadable(_part(before["objective"], name, _objective_settings(params)))
    method = params["method"] or (LoZO.name if before["method"] is None else None)
    return JobConfig.from_options(
        {
            # Last given wins: a resumed job keeps its settings but for the recipe and the flags of this command.
            **before,
            **_given(params, job_options()),
            "objective": objective,
            "method": _part(before["method"], method, _method_settings(params)),
            "output_dir": _output_dir(params, job),
        }
    )


def _chat(params: Params) -> dict[str, Any]:
    """The flags about chats as `finetune` takes them.

    Raises:
        ConfigError: the template is no file, or the variables are no JSON.
    """
    chat = _given(params, ("chat_template", "chat_template_content_format"))
    template = str(chat.get("chat_template", ""))
    if "{" not in template and template and not Path(template).is_file():
        raise ConfigError(f"--chat-template {template}: no such file (looked in {Path.cwd()}).")
    if (text := params["default_chat_template_kwargs"]) is not None:
        try:
            chat["chat_template_kwargs"] = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--default-chat-template-kwargs {text!r}: cannot be read as JSON: {error}.") from None
    return chat


def _objective_settings(params: Params) -> dict[str, Any]:
    settings = _given(params, objective_options())
    if len(settings.get("choices", ())) == 1:  # one name: a field of the data that holds the list of choices
        (settings["choices"],) = settings["choices"]
    settings |= pairs_of("--objective-option", params["objective_option"] or ())
    return {name: _with_line_feeds(name, value) for name, value in settings.items()}


def _loadable(objective: dict[str, Any]) -> dict[str, Any]:
    """The objective with its grader read, and with the module of its reward or program within reach."""
    if any(":" in (objective.get(name) or "") for name in ("reward", "play")):
        # "module:function" finds a module in the working directory, as `python -m` does. multiprocessing gives the
        # engine's process the same path.
        sys.path.insert(0, os.getcwd())
    if isinstance(grader := objective.get("grader"), str | Path):
        return {**objective, "grader": _read_grader(Path(grader))}
    return objective


def _with_line_feeds(name: str, value: Any) -> Any:
    r"""The value with typed escapes read: a shell passes "\n" on as two characters, but its writer means a line feed.

    It prints a note if that changed anything.
    """
    if isinstance(value, list):
        return [_with_line_feeds(name, part) for part in value]
    if not isinstance(value, str):
        return value
    read = TYPED_ESCAPE.sub(lambda found: found[0][1:] if found[1] else ESCAPES[found[2]], value)
    if read != value:
        note = r"\n is a line feed and \t a tab; for a backslash in front of these letters write two"
        print(f"vllm-zo: {flag_of(name)} {value!r}: {note}.", file=sys.stderr)
    return read


def _read_grader(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--grader {path}: cannot be read as JSON: {error}.") from None


def _method_settings(params: Params) -> dict[str, Any]:
    settings = _given(params, method_options())
    parts = {name: _part_settings(name, settings[name]) for name in PARTS if name in settings}
    return {**settings, **parts, **pairs_of("--method-option", params["method_option"] or ())}


def _part_settings(flag: str, text: str) -> dict[str, Any]:
    """ "adam:beta1=0.8,beta2=0.99" -> {"name": "adam", "beta1": 0.8, "beta2": 0.99}."""
    name, _, settings = text.partition(":")
    return {"name": name, **pairs_of(f"--{flag} {name}:", settings.split(",") if settings else ())}


def _part(before: Mapping[str, Any] | None, name: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Method or objective: the one of the earlier run, unless the user names another one, with the given settings on
    top."""
    same = before is not None and name in (None, before["name"])
    return {**(before if same and before else {"name": name}), **settings}


def _over(before: Mapping[str, Any] | None, given: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Method or objective of an earlier run, with what a recipe gives over it."""
    if given is None or before is None:
        return before if given is None else given
    return _part(before, given["name"], {**given})


def _output_dir(params: Params, before: Mapping[str, Any]) -> str | None:
    output = None if params["output"] is None else Path(params["output"])
    if before:
        # The job's seed log is there, and a job has one log.
        if output is not None and output.resolve() != params["resume_from"].resolve():
            raise ConfigError(f"--output {output}: a resumed run stays in its directory; drop --output.")
        return before["output_dir"]
    output = output or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if JobDir(output).log.exists():
        raise ConfigError(f"--output {output}: holds another run; --resume-from continues it, or choose another.")
    return str(output)


# --- the engine -------------------------------------------------------------------------------------------------------


def _engine_options(params: Params, recipe: Recipe) -> dict[str, Any]:
    """Options of vLLM's LLM."""
    given = pairs_of("--engine-option", params["engine_option"] or ())
    return {**recipe.vllm, **_given(params, ("dtype", "max_model_len")), **given}


def engines_of(plan: Plan) -> AbstractContextManager[Any]:
    """One engine, or as many as --engines says, here or on Ray."""
    model, number, quiet = plan.model, plan.params["engines"], bool(plan.params["quiet"])
    ray = plan.params["ray"]
    if number is None and ray is not None:
        raise ConfigError(f"--ray {ray}: say with --engines how many engines to start there.")
    if number is None:
        return nullcontext(start_engine(model, plan.zo, plan.engine, plan.recipe, quiet=quiet))
    from vllm_zo.entrypoints.cluster.cluster import Cluster

    check_local_model(model, f"--model {model}")
    quiet_vllm()  # for the engines, which inherit the environment
    show_ours(logging.WARNING if quiet else logging.INFO)
    return Cluster(model, number, zo_training=plan.zo, ray=ray, **plan.engine)


def start_engine(
    model: str, zo: ZOTrainingConfig, options: Mapping[str, Any], recipe: Recipe = EMPTY, *, quiet: bool = False
) -> Any:
    """Make vLLM's LLM with training on, without the lines that vLLM prints at its start.

    Args:
        options: vLLM's own.
        recipe: where some of them may come from.

    Raises:
        ConfigError: training or vLLM refuses an option or the model.
    """
    check_local_model(model, f"--model {model}")
    # Both set environment variables, and vLLM reads some of them while it is imported.
    quiet_vllm()
    chosen = apply_cpu_defaults(world_size_of(options))
    from vllm.engine.arg_utils import EngineArgs

    from vllm_zo import LLM

    recipe.check_vllm([*(f.name for f in fields(EngineArgs)), *signature(LLM.__init__).parameters])
    level = logging.WARNING if quiet else logging.INFO
    show_ours(level)
    if chosen:
        logger.info("on CPU, chosen: %s", ", ".join(f"{name}={value}" for name, value in chosen.items()))
    if is_cpu_build() and not has_native_bfloat16() and options.get("dtype", "auto") != "float32":
        logger.info("this CPU has no bfloat16 instructions: --dtype float32 is faster")
    try:
        llm = LLM(model, zo_training=asdict(zo), use_tqdm_on_load=False, **options)
    except ConfigError:  # ours names the fix already; it is a ValueError too, which the next clause would wrap
        raise
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # vLLM's for a model or an option it does not take
        given = "".join(f", {name}={value!r}" for name, value in options.items())
        raise ConfigError(f"the engine does not start with model={model!r}{given}: {_reason(error)}") from error
    show_ours(level)  # again: vLLM configures its logging anew when it makes an engine
    return llm


def _reason(error: Exception) -> str:
    """The message on one line. Of pydantic's report it has what the checks said, without links and the whole input."""
    from pydantic import ValidationError  # comes with vLLM, which has just been imported

    failed = error.errors() if isinstance(error, ValidationError) else []
    said = "; ".join(": ".join([*map(str, check["loc"]), check["msg"]]) for check in failed) or str(error)
    return " ".join(said.split())


def pairs_of(flag: str, pairs: Iterable[str]) -> dict[str, Any]:
    """Options from words of the form name=value. A value that is not JSON is text.

    Raises:
        ConfigError: a word has another form.
    """
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


_EXAMPLES = {
    "--engine-option": "tensor_parallel_size=2",
    "--method-option": "rank=4",
    "--objective-option": "mode=full",
}


# --- the run ----------------------------------------------------------------------------------------------------------


class KeptRecipe:
    """A callback that writes the recipe of a run into the job's directory when the job has begun.

    Not before: a job that is refused leaves no directory behind.
    """

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, text
        self._written = False

    def __call__(self, *_: object) -> None:
        if not self._written:
            self._written = True
            try:
                write_atomically(self._path, self._text.encode())
            except JobError as error:  # a full disk costs the recipe only; the job waits for space by itself
                logger.warning("no recipe kept: %s", error)

    def command(self) -> str:
        """A line that says how to repeat the run."""
        self()  # a run without a step or an evaluation has called no callback
        return repeated_by(self._path)


def save_results(run: FineTuneRun, plan: Plan, test: Mapping[str, float]) -> tuple[list[str], Path | None]:
    """Write the adapter (`bank`) or the merged model (`fold`) with its model card, `run.png`, and the numbers into
    `summary.json`.

    Args:
        test: loss and metrics on the test data of a task.

    Returns:
        A line for each thing that it wrote; and the directory of the adapter or model, None where there is none.
    """
    metrics = run.metrics | {f"test_{name}": value for name, value in test.items()}
    lines = [", ".join(f"{name} {_short(value)}" for name, value in metrics.items())]
    saved: Path | None = None
    if run.history or run.config.steps:
        line, saved, rank = _save_model(run)
        lines.append(line)
    picture: Path | None = None
    try:
        run.plot(run.directory / CURVE)
        picture = run.directory / CURVE
        lines.append(f"picture: {picture}")
    except (ConfigError, OSError) as error:  # matplotlib is optional, and a full disk costs the picture only
        lines.append(f"no picture: {error}")
    path = JobDir(run.directory).summary
    if saved is not None:
        _write_card(Card(run.model, run.config, plan.data, metrics, plan.recipe_text(path), rank), saved, picture)
    # The engine has written the job's end into it: the numbers are added, and nothing is taken out.
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_atomically(path, json.dumps(before | {"metrics": metrics}, indent=1).encode())
    return lines, saved


def _save_model(run: FineTuneRun) -> tuple[str, Path, int | None]:
    """What it wrote as a line, where that is, and the adapter's rank."""
    if run.config.space == "fold":
        run.save_merged(merged := run.directory / "merged")
        return f"merged model: {merged}", merged, None
    report = run.save(run.directory / "adapter")
    return (
        "\n".join([f"adapter of rank {report.rank}: {report.directory}", *report.warnings]),
        report.directory,
        report.rank,
    )


def _write_card(card: Card, directory: Path, picture: Path | None) -> None:
    """The model card, and the picture that it shows (if one was drawn), beside the model."""
    if picture is not None:
        write_atomically(directory / CURVE, picture.read_bytes())
    write_atomically(directory / "README.md", card.text(curve=picture is not None).encode())


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
