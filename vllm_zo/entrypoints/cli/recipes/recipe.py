"""What a recipe says: options of the run, the job and the engine, each under its own name.

    model: facebook/opt-125m                # options of the run (run_options.py) and of the job (JobConfig)
    train: train.jsonl
    steps: 400
    objective: {name: classification, ...}  # the fields of the objective
    method: {name: lozo, rank: 2}           # the fields of the method; or its name alone
    engine: {slot_rank: 32, dtype: float32} # ZOTrainingConfig, and any option of vLLM's LLM

This file takes all names and ranges from the options' fields, so a new option needs nothing here.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import vllm_zo
from vllm_zo.config import JobConfig, ZOTrainingConfig
from vllm_zo.entrypoints.cli.recipes.document import Document, read_document, to_yaml
from vllm_zo.entrypoints.cli.run_options import RunOptions
from vllm_zo.errors import ConfigError
from vllm_zo.methods import METHODS
from vllm_zo.objectives import OBJECTIVES
from vllm_zo.options import Setting, options_of
from vllm_zo.registry import Registry
from vllm_zo.validation import check_keys, reject, suggestion

RUN = options_of(RunOptions)
JOB = {name: setting for name, setting in options_of(JobConfig).items() if name != "output_dir"}
"""Without `output_dir`: the run's `output` decides it."""
PARTS: dict[str, Registry[Any]] = {"objective": OBJECTIVES, "method": METHODS}
ENGINE = "engine"
CHATS = ("chat_template", "default_chat_template_kwargs", "chat_template_content_format")
OF_A_TASK = ("task", "data", "data_seed", "train_examples")
OF_FILES = ("train", "validation", "objective", *CHATS)
"""A run takes its data either from a ready-made task or from files with an objective."""


@dataclass(frozen=True)
class Recipe:
    """The options that a recipe gives. Its document knows where each stands.

    Attributes:
        run: options of `RunOptions`.
        config: options of `JobConfig`; `objective` and `method` as {"name": ..., fields}.
        engine: options of `ZOTrainingConfig` and of vLLM's `LLM`.
    """

    run: Mapping[str, Any]
    config: Mapping[str, Any]
    engine: Mapping[str, Any]
    document: Document | None = None

    @property
    def zo(self) -> dict[str, Any]:
        """The engine options that are those of training."""
        return {name: value for name, value in self.engine.items() if name in options_of(ZOTrainingConfig)}

    @property
    def vllm(self) -> dict[str, Any]:
        """The engine options that are vLLM's own."""
        return {name: value for name, value in self.engine.items() if name not in options_of(ZOTrainingConfig)}

    def check_vllm(self, known: Collection[str]) -> None:
        """Refuse an engine option that vLLM does not have. Only the importer of vLLM knows which it has.

        Raises:
            ConfigError: the message names the nearest option, and the line.
        """
        if self.document is not None:
            for name in self.vllm:
                with self.document.at(ENGINE, name):
                    check_keys("engine option", {name: None}, {*known, *options_of(ZOTrainingConfig)})

    def under(self, flags: Mapping[str, Any]) -> Recipe:
        """The recipe without what the flags of a command replace as a whole."""
        dropped: set[str] = set()
        if flags["task"] is not None:
            dropped |= {*OF_FILES}
        elif flags["train"] is not None:
            dropped |= {*OF_A_TASK}
        if flags["resume_from"] is not None:
            dropped.add("output")
        run, config = (
            {name: value for name, value in part.items() if name not in dropped} for part in (self.run, self.config)
        )
        return replace(self, run=run, config=config)


EMPTY = Recipe({}, {}, {})


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file, each value checked by itself. What does not go together shows when the job is made.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the message has the nearest one), or a value is out of
            range. The message names the line.
    """
    document = read_document(path)
    for key in document.values:
        with document.at(key):
            _check_key(key)
    _check_one_source(document)
    return Recipe(
        run=_checked(document, RUN),
        config={
            **{kind: _part(document, kind) for kind in PARTS if kind in document.values},
            **_checked(document, JOB),
        },
        engine=_engine(document),
        document=document,
    )


def _check_key(key: str) -> None:
    known = [*RUN, *JOB, *PARTS, ENGINE]
    if key in known:
        return
    inside = [kind for kind, parts in PARTS.items() if any(key in options_of(parts[name]) for name in parts)]
    inside += [ENGINE] if key in options_of(ZOTrainingConfig) else []
    if inside:
        raise ConfigError(f"{key!r} is not a key of the recipe itself: write it under {' or '.join(inside)}.")
    if key == "output_dir":
        raise ConfigError("unknown key 'output_dir': in a recipe it is 'output'.")
    raise ConfigError(f"unknown key {key!r}: {suggestion(str(key).replace('-', '_'), known)}")


def _check_one_source(document: Document) -> None:
    given = document.values
    if given.get("task") is not None:
        for name in OF_FILES:
            if given.get(name) is not None:
                with document.at(name):
                    raise ConfigError(f"{name}: task {given['task']!r} brings its own; drop one of the two.")


def _checked(document: Document, known: Mapping[str, Setting]) -> dict[str, Any]:
    values = {}
    for name, value in document.values.items():
        if name in known:
            with document.at(name):
                values[name] = known[name].checked(name, value)
    return values


def _part(document: Document, kind: str) -> dict[str, Any]:
    """An objective or a method as {"name": ..., fields}."""
    given = document.values[kind]
    given = {"name": given} if isinstance(given, str) else given
    with document.at(kind):
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            reject(kind, given, f"a mapping with a name, one of {', '.join(PARTS[kind])}")
    with document.at(kind, "name"):
        part = PARTS[kind].find(given["name"])
    settings = options_of(part)
    described = {"name": given["name"]}
    for name, value in given.items():
        if name != "name":
            with document.at(kind, name):
                check_keys(f"setting of {kind} {given['name']}", {name: value}, [f.name for f in fields(part)])
                described[name] = settings[name].checked(f"{kind}.{name}", value) if name in settings else value
    return described


def _engine(document: Document) -> dict[str, Any]:
    given = document.values.get(ENGINE) or {}
    with document.at(ENGINE):
        if not isinstance(given, dict):
            reject(ENGINE, given, "a mapping such as {slot_rank: 32, dtype: float32}")
    ours = options_of(ZOTrainingConfig)
    checked = {}
    for name, value in given.items():
        with document.at(ENGINE, str(name)):
            checked[str(name)] = ours[name].checked(f"engine.{name}", value) if name in ours else value
    return checked


# --- the recipe that a job keeps --------------------------------------------------------------------------------------


def resolved_recipe(
    run: Mapping[str, Any], config: JobConfig, zo: ZOTrainingConfig, engine: Mapping[str, Any], where: Path
) -> str:
    """The text of a recipe that repeats a run: every option as it was, defaults too, and paths that hold anywhere.

    Args:
        run: model and data of the run: `RunOptions` by name. What decides only where results go is left out.
        engine: options of vLLM's `LLM`.
        where: the file that the text goes to; its first line has the command.
    """
    plain = config.to_json()
    source = OF_A_TASK if run.get("task") else OF_FILES
    job = {name: plain[name] for name in JOB if not (plain[name] is None and JOB[name].default is None)}
    values = {
        "model": _anywhere(run["model"]),
        **{name: _anywhere(run[name]) for name in source if run.get(name) is not None},
        **({} if run.get("task") else {"objective": plain["objective"]}),
        "method": plain["method"],
        **job,
        ENGINE: {**{name: value for name, value in asdict(zo).items() if value is not None}, **engine},
    }
    return f"# vllm-zo {vllm_zo.__version__}. {repeated_by(where)}\n{to_yaml(values)}"


def repeated_by(recipe: Path) -> str:
    """The command that repeats a run, for a person to copy."""
    return f"To repeat this run: vllm-zo train {shlex.quote(str(recipe))}"


def _anywhere(value: Any) -> Any:
    """The absolute path of a file or directory that exists; any other value (a name on a hub, a number) as it is."""
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value
