"""`vllm-zo serve MODEL [any vllm serve flag] [--zo-...]`: vLLM's own server, with training.

All it does is to work out flags and environment; `--zo-print-flags` shows them, for a plain `vllm serve`. vLLM is
imported when the environment is set.
"""

from __future__ import annotations

import json
import os
import shlex
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vllm_zo.compat import moved
from vllm_zo.compat.seams import check_vllm
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.cpu_defaults import apply_cpu_defaults, is_cpu_build
from vllm_zo.entrypoints.openai.settings import (
    DEFAULT_STATE_DIR,
    DEFAULT_TOKEN_BUDGET,
    SETTINGS_KEY,
    ServerSettings,
)
from vllm_zo.entrypoints.openai.state_dir import StateDir
from vllm_zo.errors import ConfigError

OUR_PLUGINS = ("zo", "zo_server")
OPT_IN_GROUP = "vllm.endpoint_plugins"
DEFAULT_MAX_LORAS = 4
"""Adapters that may be used in one batch, so that requests for different fine-tuned models run together."""
PRINTED = ("enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank", "scheduler_cls", "worker_cls")


def plugin_allow_list(environment: Mapping[str, str]) -> str:
    """VLLM_PLUGINS for a server with our endpoints.

    It is an allow-list for all groups of plugins at once: what would have been loaded without it stays in. Endpoint
    plugins of others are loaded only where the user has named them, as ever.
    """
    if "VLLM_PLUGINS" in environment:
        names = [name for name in environment["VLLM_PLUGINS"].split(",") if name]
    else:
        found = entry_points()
        groups = [group for group in found.groups if group.startswith("vllm.") and group != OPT_IN_GROUP]
        names = sorted({point.name for group in groups for point in found.select(group=group)})
    return ",".join(dict.fromkeys([*names, *OUR_PLUGINS]))


def add_flags(parser: ArgumentParser) -> None:
    """Our flags, with the defaults of the options they set."""
    group = parser.add_argument_group("Training", "Fine-tuning jobs over HTTP, and what the engine reserves for them.")

    def flag(name: str, owner: Any, field: str, kind: Any, text: str, **more: Any) -> None:
        default = next(f.default for f in fields(owner) if f.name == field)
        group.add_argument(name, type=kind, default=default, help=f"{text} (default: {default})", **more)

    group.add_argument(
        "--zo-state-dir",
        default=DEFAULT_STATE_DIR,
        metavar="DIR",
        help=f"Files, jobs, events, checkpoints and adapters; made if missing (default: {DEFAULT_STATE_DIR}).",
    )
    flag("--zo-concurrent-jobs", ZOTrainingConfig, "concurrent_jobs", int, "Jobs that run together; the rest queue.")
    flag("--zo-slots", ZOTrainingConfig, "slots", int, "Adapter slots of each running job: 2 a direction.")
    flag("--zo-slot-rank", ZOTrainingConfig, "slot_rank", int, "Rank of a slot: (bases + 1) * rank must fit.")
    group.add_argument(
        "--zo-token-budget",
        type=int,
        default=DEFAULT_TOKEN_BUDGET,
        help="Most training tokens in an engine step that also serves requests: the lower, the less they wait and the "
        f"slower jobs are meanwhile; 0: no limit (default: {DEFAULT_TOKEN_BUDGET}).",
    )
    flag("--zo-upload-limit-mb", ServerSettings, "upload_limit_mb", int, "Largest file that may be uploaded, in MiB.")
    group.add_argument(
        "--allow-python-graders",
        action=BooleanOptionalAction,
        default=False,
        help="Run Python code that clients send in graders, with the rights of this server (default: no).",
    )
    group.add_argument(
        "--zo-print-flags", action="store_true", help="Print the plain vllm serve command that does the same, and stop."
    )


def serve(argv: Sequence[str]) -> None:
    """Run the server until a signal ends it.

    Raises:
        ConfigError: a flag, the model or the state directory cannot work; before the engine is started.
    """
    os.environ["VLLM_PLUGINS"] = plugin_allow_list(os.environ)
    apply_cpu_defaults(in_process=False)
    check_vllm()  # before anything is imported from it by name
    moved.find("cli_env_setup")()
    args = parse(argv)
    if args.zo_print_flags:
        print(as_command(args, argv))
        return
    StateDir(Path(args.zo_state_dir)).acquire().release()  # before the engine is loaded for nothing
    import uvloop
    from vllm import logger as vllm_logger
    from vllm.entrypoints.launchers.api_server.entry import run_server

    if hasattr(vllm_logger, "configure_logging_from_args"):  # 0.30 has no flags for logging yet
        vllm_logger.configure_logging_from_args(args)
    moved.find("validate_parsed_serve_args")(args)
    uvloop.run(run_server(args))


def parse(argv: Sequence[str]) -> Namespace:
    """vLLM's arguments for its server, with training switched on."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(
        prog="vllm-zo serve",
        usage="vllm-zo serve MODEL [any vllm serve flag] [--zo-...]",
        description="vLLM's OpenAI-compatible server that also fine-tunes the model it serves.",
    )
    add_flags(parser)
    moved.find("make_arg_parser")(parser)
    args = parser.parse_args(list(argv))
    args.model = args.model_tag or args.model
    _switch_training_on(args, {name for name, value in vars(args).items() if value != parser.get_default(name)})
    return args


def _switch_training_on(args: Namespace, given: set[str]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from vllm_zo.entrypoints.engine_options import engine_options
    from vllm_zo.entrypoints.openai.plugin import check_arguments

    check_arguments(args)
    if args.headless or args.grpc:
        raise ConfigError("--headless and --grpc: training needs the HTTP server in front of its engine; drop them.")
    zo = ZOTrainingConfig(
        slots=args.zo_slots,
        concurrent_jobs=args.zo_concurrent_jobs,
        slot_rank=args.zo_slot_rank,
        token_budget=args.zo_token_budget or None,
        state_dir=str(Path(args.zo_state_dir).resolve()),
    )
    settings = ServerSettings(
        upload_limit_mb=args.zo_upload_limit_mb,
        allow_python_graders=args.allow_python_graders,
    )
    engine = {f.name for f in fields(AsyncEngineArgs)} - {"model"}
    options: dict[str, Any] = {name: getattr(args, name) for name in given & engine}
    options.setdefault("max_loras", DEFAULT_MAX_LORAS)
    if is_cpu_build() and args.tensor_parallel_size == 1:
        options.setdefault(
            "distributed_executor_backend", "uni"
        )  # the worker in the engine's process: one less to start
    options = engine_options(args.model, zo, options)
    options["additional_config"][SETTINGS_KEY] = asdict(settings)
    for name, value in options.items():
        setattr(args, name, value)


def as_command(args: Namespace, argv: Sequence[str]) -> str:
    """The plain `vllm serve` command that does the same.

    Args:
        args: what `parse` has made of `argv`.
    """
    ours = ArgumentParser(add_help=False, allow_abbrev=False)
    add_flags(ours)
    _, theirs = ours.parse_known_args(list(argv))
    words = [f"VLLM_PLUGINS={os.environ['VLLM_PLUGINS']}", "vllm", "serve", *theirs]
    for name in PRINTED:
        value = getattr(args, name)
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    words += ["--additional-config", json.dumps(args.additional_config)]
    return shlex.join(words)
