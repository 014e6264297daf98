"""The command `vllm-zo`. Only the commands that need vLLM import it, and inside their function: it takes seconds."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import vllm_zo
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.cli.flags import check_command, train_command
from vllm_zo.errors import ConfigError, ZOError
from vllm_zo.tasks import PRESETS as TASKS

BENCHMARK = Path("benchmarks") / "core_step.py"
"""In the repository; the installed package does not have it."""

RAY_ADDRESS = re.compile(r"auto|local|(ray://)?[\w.\-\[\]:]+:\d+")
Ray = Annotated[
    str | None,
    typer.Option(help="A Ray cluster. Alone: RAY_ADDRESS, or the one of this machine.", metavar="[HOST:PORT]"),
]

app = typer.Typer(
    help="Zeroth-order fine-tuning inside vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an unexpected error shows Python's own traceback, which people can report
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _train(flags: Mapping[str, Any]) -> None:
    from vllm_zo.entrypoints.cli.train import run_training

    if flags["check"]:
        _check(flags)
    run_training(flags)


def _check(flags: Mapping[str, Any]) -> None:
    from vllm_zo.entrypoints.cli.check import check_run

    report, usable = check_run(flags)
    print(report)
    raise typer.Exit(not usable)


app.command("train", no_args_is_help=True)(train_command(_train))
app.command("check", no_args_is_help=True)(check_command(_check))


recipes = typer.Typer(help="Recipes for `vllm-zo train`: list them, copy one, or get a JSON schema for an editor.")
app.add_typer(recipes, name="recipes", no_args_is_help=True)


@recipes.command("ls")
def list_recipes() -> None:
    """List the recipes that come with this package."""
    from vllm_zo.entrypoints.cli.recipes.packaged import listing

    print(listing())


@recipes.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="One of `vllm-zo recipes ls`.", metavar="NAME")],
    file: Annotated[Path | None, typer.Argument(help="Where to. Unset: NAME.yaml.", metavar="[FILE]")] = None,
) -> None:
    """Copy a recipe to a file, to change it and run it."""
    from vllm_zo.entrypoints.cli.recipes.packaged import copy

    print(f"to run it: vllm-zo train {copy(name, file)}")


@recipes.command("schema")
def print_schema() -> None:
    """Print the JSON schema of recipes: editors complete and check with it."""
    from vllm_zo.entrypoints.cli.recipes.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


keys = typer.Typer(help="Keys of projects for `vllm-zo serve --zo-keys FILE`. A running server sees each change.")
app.add_typer(keys, name="keys", no_args_is_help=True)
KeysFile = Annotated[Path, typer.Argument(help="The file of keys.", metavar="FILE")]


@keys.command("add")
def add_key(
    file: KeysFile,
    project: Annotated[str, typer.Argument(help="The project that the key is for.", metavar="PROJECT")],
    jobs: Annotated[int | None, typer.Option(help="Most jobs of the project that have not ended.")] = None,
    max_bytes: Annotated[int | None, typer.Option("--bytes", help="Most bytes of its files together.")] = None,
    tokens_a_day: Annotated[int | None, typer.Option(help="Most tokens that its jobs train on, a day.")] = None,
    requests_a_minute: Annotated[int | None, typer.Option(help="Most requests a minute.")] = None,
) -> None:
    """Make a key, and the file if it is missing. The key is shown once; limits that are given change the project's."""
    from vllm_zo.entrypoints.cli.keys import add

    limits = {"jobs": jobs, "bytes": max_bytes, "tokens_a_day": tokens_a_day, "requests_a_minute": requests_a_minute}
    print(add(file, project, {name: value for name, value in limits.items() if value is not None}))


@keys.command("ls")
def list_keys(file: KeysFile) -> None:
    """List the projects, their limits and the ids of their keys."""
    from vllm_zo.entrypoints.cli.keys import listing

    print(listing(file))


@keys.command("rm")
def remove_key(
    file: KeysFile,
    key: Annotated[str, typer.Argument(help="The id of a key, from `vllm-zo keys ls`.", metavar="KEY_ID")],
) -> None:
    """Take a key away. What its project has made stays."""
    from vllm_zo.entrypoints.cli.keys import remove

    print(remove(file, key))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. It prints a ZOError on one line and ends with exit status 2 for a ConfigError, 1 for any other.

    Args:
        argv: arguments without the program's name. None: those of this process.
    """
    try:
        app(args=_with_addresses(sys.argv[1:] if argv is None else argv), prog_name="vllm-zo")
    except ZOError as error:
        print(f"vllm-zo: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def _with_addresses(argv: Sequence[str]) -> list[str]:
    """The arguments with "auto" after a `--ray` that no address follows: typer has no flags with an optional value."""
    given: list[str] = []
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        given.append(argument)
        if argument == "--ray" and not RAY_ADDRESS.fullmatch(following):
            given.append("auto")
    return given


def _version(wanted: bool) -> None:
    if wanted:
        print(f"vllm-zo {vllm_zo.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""
    # Empty: typer takes such options from the callback's parameters, and `_version` does the work.


Upto = Annotated[int | None, typer.Option(help="Use the first UPTO steps of the log.", metavar="STEP")]
Model = Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")]


@app.command()
def export(
    job: Annotated[Path, typer.Argument(help="Directory of a job (--output of train).", metavar="JOB_DIR")],
    out: Annotated[Path, typer.Argument(help="Directory to write.", metavar="OUT")],
    merged: Annotated[bool, typer.Option("--merged", help="Write a whole model instead of an adapter.")] = False,
    rank: Annotated[int | None, typer.Option(help="Compress the adapter to this rank; prints what that loses.")] = None,
    upto: Upto = None,
    model: Model = None,
) -> None:
    """Write what a job trained as a PEFT adapter or as a merged model.

    Without --upto it writes the state that the job gave back: the best evaluation's, or the last step's.
    """
    from vllm_zo.entrypoints.cli.saved import export_job

    print(export_job(job, out, merged=merged, rank=rank, upto=upto, model=model))


@app.command()
def replay(
    log: Annotated[Path, typer.Argument(help="A seed log, or the directory of a job.", metavar="LOG|JOB_DIR")],
    upto: Upto = None,
    output: Annotated[Path | None, typer.Option(help="Write the adapter (after `fold`: the model).")] = None,
    model: Model = None,
) -> None:
    """Rebuild a run from the base model and its seed log alone, and compare it with what the job had published."""
    from vllm_zo.entrypoints.cli.saved import replay_job

    for line in replay_job(log, upto=upto, output=output, model=model):
        print(line, flush=True)  # each line when its work is done: a replay takes minutes


@app.command("eval")
def evaluate(
    tasks: Annotated[str, typer.Option(help=f"Ready-made tasks: {', '.join(TASKS)}; commas between them.")],
    model: Annotated[str | None, typer.Option(help="Model: a directory or a name. Unset: the job's.")] = None,
    job: Annotated[Path | None, typer.Option(help="Also evaluate what this run has learnt.", metavar="DIR")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Directory of the task's files, or of a folder a task. Unset: the hub.", metavar="DIR"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the test rows, as --data-seed of train.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="Type of the weights, as for train.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence. Unset: the model's.")] = None,
    engine_option: Annotated[list[str] | None, typer.Option(help="Any option of vLLM's LLM.", metavar="K=V")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a task, for programs.")] = False,
) -> None:
    """Measure the base, and what a run has learnt, on the test rows of ready-made tasks."""
    from vllm_zo.entrypoints.cli.evaluate import evaluate as run
    from vllm_zo.entrypoints.cli.train import pairs_of

    given = {name: value for name, value in (("dtype", dtype), ("max_model_len", max_model_len)) if value is not None}
    engine = given | pairs_of("--engine-option", engine_option or ())
    for line in run(tasks, model, job, data, seed, engine, as_json=as_json):
        print(line, flush=True)


# Without typer's own help option, `--help` reaches the script among its other arguments.
@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Measure milliseconds a step against other implementations (benchmarks/core_step.py takes the arguments)."""
    script = Path(vllm_zo.__file__).resolve().parents[1] / BENCHMARK
    if not script.exists():
        raise ConfigError(
            f"{BENCHMARK} is not in the installed package: clone the repository and run `make bench` there, or "
            "`vllm-zo bench` from an editable install of it."
        )
    raise typer.Exit(subprocess.run([sys.executable, str(script), *context.args]).returncode)


# vLLM's own parser reads the arguments, `--help` among them: typer cannot know vLLM's flags.
@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Serve a model and fine-tune it at the same time: vLLM's OpenAI server, with the fine-tuning API."""
    from vllm_zo.entrypoints.server.launch import serve as run

    run(context.args)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON, for programs.")] = False,
    model: Annotated[str | None, typer.Option(help="Also print what training reserves for this model.")] = None,
    slots: Annotated[int, typer.Option(help="Adapter slots of a running job.")] = ZOTrainingConfig.slots,
    slot_rank: Annotated[int, typer.Option(help="Rank of a slot.")] = ZOTrainingConfig.slot_rank,
    concurrent_jobs: Annotated[int, typer.Option(help="Most jobs at a time.")] = ZOTrainingConfig.concurrent_jobs,
    dtype: Annotated[str, typer.Option(help="Data type of the model, as for train.")] = "auto",
    ray: Ray = None,
) -> None:
    """Say whether this machine and the installed vLLM can train; exit status 1 if something is missing."""
    from vllm_zo.entrypoints.cli import doctor as examination
    from vllm_zo.entrypoints.cli.doctor import MISSING, as_text, examine, to_json

    zo = ZOTrainingConfig(slots=slots, slot_rank=slot_rank, concurrent_jobs=concurrent_jobs)
    memory = [] if model is None else list(examination.slots(model, zo, dtype))
    checks = [*examine(), *memory, *([] if ray is None else examination.cluster(ray))]
    print(to_json(checks) if as_json else as_text(checks))
    raise typer.Exit(any(check.status == MISSING for check in checks))


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")] = False,
    ray: Ray = "auto",
) -> None:
    """Show the clusters on Ray and their jobs (train --ray), from any of its machines."""
    from vllm_zo.entrypoints.cluster.on_ray.connect import require_ray

    require_ray()
    from vllm_zo.entrypoints.cluster.on_ray.clusters import as_text, statuses

    found = list(statuses(ray or "auto"))
    lines = map(json.dumps, found) if as_json else map(as_text, found)
    print("\n".join(lines) or "no cluster")


@app.command()
def stop(
    cluster: Annotated[str | None, typer.Argument(help="See `vllm-zo status`. Unset: the only one.")] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="At once, without a last evaluation.")] = False,
    ray: Ray = "auto",
) -> None:
    """End a job on Ray in good order (it evaluates and publishes), and then its engines; waits for that."""
    from vllm_zo.entrypoints.cluster.on_ray.connect import require_ray

    require_ray()
    from vllm_zo.entrypoints.cluster.on_ray.clusters import stop as end

    print(": ".join(end(ray or "auto", cluster, cancel=cancel)))
