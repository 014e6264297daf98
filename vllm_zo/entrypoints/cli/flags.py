"""The flags of `vllm-zo train`: the options of job, method, objective and engine, and those of the command itself.

This file makes an option's flag from the option's field (vllm_zo/options.py), so a new option needs a new field and
nothing here. A flag that the user does not give is None. The help shows the default of the field, and only the field
has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer

from vllm_zo.config import RESULTS, JobConfig, ZOTrainingConfig
from vllm_zo.entrypoints.cli.run_options import DATA, RunOptions
from vllm_zo.errors import ConfigError
from vllm_zo.methods import ESTIMATORS, METHODS, OPTIMIZERS, LoZO
from vllm_zo.methods.base import Method
from vllm_zo.objectives import OBJECTIVES
from vllm_zo.options import Setting, options_of
from vllm_zo.registry import Registry

METHOD, ENGINE = "Method", "Engine"
PARTS: dict[str, Registry[Any]] = {"estimator": ESTIMATORS, "optimizer": OPTIMIZERS}
"""Options of a method whose value is a part with settings of its own: "adam:beta1=0.8"."""


def train_command(run: Callable[[Mapping[str, Any]], None]) -> Callable[..., None]:
    """The command `train` for typer: a function with a parameter for each flag, which passes all of them to `run` by
    name."""
    what = "Fine-tune a model inside vLLM: metrics as it goes, then an adapter (or merged model) and a picture."
    check = _flag("check", bool, RESULTS, "Say what the run would do, as `vllm-zo check`, and stop.", "--check")
    return _command(run, {**_flags(), "check": check}, what)


def check_command(run: Callable[[Mapping[str, Any]], None]) -> Callable[..., None]:
    """The command `check`, with the flags of `train`."""
    what = "Say what a run would train on and what a step takes, without an engine: data, labels, lengths, one example."
    text = "Also say how long the run would take: start the engine and take three steps."
    measure = _flag("measure", bool, RESULTS, text, "--measure")
    data = typer.Argument(help="Training data, or a recipe. The flags are those of train.", metavar="[DATA|RECIPE]")
    return _command(run, {**_flags(), "recipe": _argument(data), "measure": measure}, what)


def _command(run: Callable[[Mapping[str, Any]], None], flags: dict[str, Parameter], what: str) -> Callable[..., None]:
    def command(context: typer.Context, **given: Any) -> None:
        run(given)

    context = Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)
    # typer reads both: the parameters from the signature, their types and options from the annotations.
    command.__signature__ = Signature([context, *flags.values()])  # type: ignore[attr-defined]
    command.__annotations__ = {name: flag.annotation for name, flag in flags.items()} | {"context": typer.Context}
    command.__doc__ = what
    return command


def objective_options() -> dict[str, Setting]:
    """Those options of all objectives that have a flag, by name."""
    return _with_a_flag(OBJECTIVES)


def method_options() -> dict[str, Setting]:
    """Those options of all methods that have a flag, by name: those of single methods, then those of every method."""
    options = _with_a_flag(METHODS)
    common = options_of(Method)
    return {name: s for name, s in options.items() if name not in common} | {name: options[name] for name in common}


def job_options() -> dict[str, Setting]:
    """Those options of a job that have a flag, by name."""
    return {name: setting for name, setting in options_of(JobConfig).items() if setting.option.panel}


def training_options() -> dict[str, Setting]:
    """Those options of the engine's training that have a flag, by name."""
    return {name: setting for name, setting in options_of(ZOTrainingConfig).items() if setting.option.panel}


def flag_of(name: str) -> str:
    """The flag as a user writes it, from the parameter's name."""
    setting = objective_options().get(name)
    return f"--{(setting.option.flag if setting and setting.option.flag else name).replace('_', '-')}"


def _flags() -> dict[str, Parameter]:
    """All flags by name, in the order of the help. Of two flags with one name the first stays."""
    flags: dict[str, Parameter] = {}
    for flag in _in_order():
        flags.setdefault(flag.name, flag)
    return flags


def _in_order() -> Iterator[Parameter]:
    file = typer.Argument(help="YAML or TOML file with any of these options; flags win.", metavar="[RECIPE]")
    yield _argument(file)
    ours = "A recipe of this package in place of a file: one of `vllm-zo recipes ls`."
    yield _flag("packaged_recipe", str, DATA, ours, "--recipe", metavar="NAME")
    run = [(setting, _flag_of_option(setting, "")) for setting in options_of(RunOptions).values()]
    yield from (flag for setting, flag in run if setting.option.panel == DATA)
    yield _flag("objective", str, DATA, f"{' or '.join(OBJECTIVES)}; the first where there are --option.")
    yield from (_flag_of_option(setting, _default(setting.default)) for setting in objective_options().values())
    yield _flag("objective_option", list[str], DATA, "Any other field of the objective.", metavar="K=V")

    yield _flag("method", str, METHOD, f"{', '.join(METHODS)}. (default: {LoZO.name})")
    yield from (_flag_of_option(setting, _of_method(name)) for name, setting in method_options().items())
    yield _flag("method_option", list[str], METHOD, "Any other hyperparameter of the method.", metavar="K=V")

    yield from (_flag_of_option(setting, _default(setting.default)) for setting in job_options().values())
    resume = "Continue the run in DIR; flags that are not given are as they were then."
    yield _flag("resume_from", Path, RESULTS, resume, metavar="DIR")
    yield from (flag for setting, flag in run if setting.option.panel == RESULTS)

    yield _flag("dtype", str, ENGINE, "Type of the weights: auto, float32, bfloat16, float16.")
    yield _flag("max_model_len", int, ENGINE, "Longest sequence. Unset: the model's.")
    yield from (_flag_of_option(setting, _default(setting.default)) for setting in training_options().values())
    several = "Engines that train together, each with its share of the cores or GPUs (docs/cluster.md). Unset: one."
    yield _flag("engines", int, ENGINE, several)
    on_ray = "A Ray cluster for the --engines. Alone: RAY_ADDRESS, or the one that this machine is part of."
    yield _flag("ray", str, ENGINE, on_ray, metavar="[HOST:PORT]")
    any_option = "Any option of vLLM's LLM: --engine-option tensor_parallel_size=2."
    yield _flag("engine_option", list[str], ENGINE, any_option, metavar="K=V")


def _flag(name: str, kind: Any, panel: str, text: str, flag: str = "", metavar: str | None = None) -> Parameter:
    names = [flag] if flag else []
    option = typer.Option(*names, help=text, show_default=False, rich_help_panel=panel, metavar=metavar)
    annotation = Annotated[kind | None, option]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _argument(argument: Any) -> Parameter:
    return Parameter("recipe", Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, argument])


def _flag_of_option(setting: Setting, default: str) -> Parameter:
    option = setting.option
    flag = option.flag if option.flag.startswith("--") or not option.flag else f"--{option.flag}"
    return _flag(setting.name, _type(setting), option.panel, option.help + default, flag, option.metavar or None)


def _type(setting: Setting) -> Any:
    """The type that typer reads. An option that takes a word beside numbers stays text; its own check reads it."""
    if setting.option.word:
        return str
    # bool before the numbers; float before int: where a setting takes both, "1.5" must be readable.
    for kind in (bool, float, int):
        if kind in setting.types:
            return kind
    origins = [get_origin(kind) for kind in setting.types]
    if Mapping in origins:
        return Path
    return list[str] if Sequence in origins else str


def _default(value: Any) -> str:
    return "" if value is None or value == () or isinstance(value, bool) else f" (default: {value})"


def _of_method(name: str) -> str:
    """The end of an option's help text: the default of each method, or the parts that a user may name."""
    if name in PARTS:
        return f": {_parts(PARTS[name])}."
    options = {method: options_of(part).get(name) for method, part in _loadable(METHODS).items()}
    defaults = [f"{method}: {option.default}" for method, option in options.items() if option and option.default]
    return _default(", ".join(defaults) or None)


def _parts(registry: Registry[Any]) -> str:
    """The names of all parts with their settings: "sgd | adam:beta1=0.9,beta2=0.999"."""
    shown = []
    for name, part in _loadable(registry).items():
        settings = ",".join(f"{f.name}={f.default}" for f in fields(part) if f.name != "weight_decay")
        shown.append(f"{name}:{settings}" if settings else name)
    return " | ".join(shown)


def _with_a_flag(registry: Registry[Any]) -> dict[str, Setting]:
    options: dict[str, Setting] = {}
    for part in _loadable(registry).values():
        for name, setting in options_of(part).items():
            if setting.option.panel:
                options.setdefault(name, setting)
    return options


def _loadable(registry: Registry[Any]) -> dict[str, Any]:
    """Parts by name, without those whose package cannot be imported: the help must work all the same. A run that names
    such a part raises the error."""
    parts = {}
    for name in registry:
        with contextlib.suppress(ConfigError):
            parts[name] = registry[name]
    return parts
