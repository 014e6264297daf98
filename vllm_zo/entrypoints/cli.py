"""The command `vllm-zo`. vLLM is imported by the commands that need it, when they need it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import vllm_zo
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.cli_train import train
from vllm_zo.errors import ConfigError, ZOError

BENCHMARK = Path("benchmarks") / "core_step.py"

app = typer.Typer(
    help="Zeroth-order fine-tuning inside vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(no_args_is_help=True)(train)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. A refused setting is one line and exit status 2; a job that failed is one line and exit status 1."""
    try:
        app(args=list(argv) if argv is not None else None, prog_name="vllm-zo")
    except ZOError as error:
        print(f"vllm-zo: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


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


Upto = Annotated[int | None, typer.Option(help="Use the first UPTO steps of the log.", metavar="STEP")]
Model = Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")]


@app.command()
def export(
    job: Annotated[Path, typer.Argument(help="Directory of a job (--output of train).", metavar="JOB_DIR")],
    out: Annotated[Path, typer.Argument(help="Directory to write.", metavar="OUT")],
    merged: Annotated[bool, typer.Option("--merged", help="A whole model instead of an adapter.")] = False,
    rank: Annotated[int | None, typer.Option(help="Compress the adapter to this rank; says what is lost.")] = None,
    upto: Upto = None,
    model: Model = None,
) -> None:
    """Write what a job trained as a PEFT adapter or as a merged model.

    Without --upto that is the state the job gave back: the best evaluation, or the last step.
    """
    from vllm_zo.entrypoints.saved_jobs import export_job

    print(export_job(job, out, merged=merged, rank=rank, upto=upto, model=model))


@app.command()
def replay(
    log: Annotated[Path, typer.Argument(help="A seed log, or the directory of a job.", metavar="LOG|JOB_DIR")],
    upto: Upto = None,
    output: Annotated[Path | None, typer.Option(help="Write the adapter (after `fold`: the model).")] = None,
    model: Model = None,
) -> None:
    """Rebuild a run from the base model and its seed log alone, and compare it with what the job had published."""
    from vllm_zo.entrypoints.saved_jobs import replay_job

    for line in replay_job(log, upto=upto, output=output, model=model):
        print(line, flush=True)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Milliseconds a step against other implementations (benchmarks/core_step.py; arguments go there)."""
    script = Path(vllm_zo.__file__).resolve().parents[1] / BENCHMARK
    if not script.exists():
        raise ConfigError(
            f"{BENCHMARK} is not in the installed package: clone the repository and run `make bench` there, or "
            "`vllm-zo bench` from an editable install of it."
        )
    raise typer.Exit(subprocess.run([sys.executable, str(script), *context.args]).returncode)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Serve a model and fine-tune it at the same time: vLLM's OpenAI server, with the fine-tuning API."""
    from vllm_zo.entrypoints.openai.launch import serve as run

    run(context.args)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list of checks.")] = False,
    model: Annotated[str | None, typer.Option(help="Also say what training reserves for this model.")] = None,
    slots: Annotated[int, typer.Option(help="Adapter slots of a running job.")] = ZOTrainingConfig.slots,
    slot_rank: Annotated[int, typer.Option(help="Rank of a slot.")] = ZOTrainingConfig.slot_rank,
    concurrent_jobs: Annotated[int, typer.Option(help="Jobs that run together.")] = ZOTrainingConfig.concurrent_jobs,
    dtype: Annotated[str, typer.Option(help="As for train.")] = "auto",
) -> None:
    """Say whether this machine and the installed vLLM can train; exit status 1 when something is missing."""
    from vllm_zo.entrypoints import doctor as examination
    from vllm_zo.entrypoints.doctor import MISSING, as_text, examine, to_json

    zo = ZOTrainingConfig(slots=slots, slot_rank=slot_rank, concurrent_jobs=concurrent_jobs)
    memory = [] if model is None else list(examination.slots(model, zo, dtype))
    checks = [*examine(), *memory]
    print(to_json(checks) if as_json else as_text(checks))
    raise typer.Exit(any(check.status == MISSING for check in checks))
