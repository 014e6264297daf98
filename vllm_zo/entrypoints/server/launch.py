"""`vllm-zo serve MODEL [any vllm serve flag] [--zo-...]`: vLLM's own server, with training.

It only works out flags and environment; `--zo-print-flags` prints them for a plain `vllm serve`. It imports vLLM after
it has set the environment, because vLLM reads some variables while it is imported.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vllm_zo.compat import moved
from vllm_zo.compat.seams import check_vllm
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.cluster import seats
from vllm_zo.entrypoints.llm.cpu_defaults import is_cpu_build
from vllm_zo.entrypoints.server.settings import (
    DEFAULT_SLOWDOWN,
    DEFAULT_STATE_DIR,
    SETTINGS_KEY,
    ServerSettings,
)
from vllm_zo.entrypoints.server.state.directory import StateDir
from vllm_zo.errors import ConfigError

OUR_PLUGINS = ("zo", "zo_server")
OPT_IN_GROUP = "vllm.endpoint_plugins"
DEFAULT_MAX_LORAS = 4
"""How many adapters one batch may use (vLLM's default is 1), so that requests for different fine-tuned models run
together."""
PRINTED = (
    "enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank", "scheduler_cls", "worker_cls",
    "distributed_executor_backend", "cudagraph_capture_sizes", "api_server_count",
)  # fmt: skip
"""The flags whose values training sets."""


def plugin_allow_list(environment: Mapping[str, str]) -> str:
    """VLLM_PLUGINS for a server with our endpoints.

    It is an allow-list for all groups of plugins at once, so the list names every plugin that vLLM would load without
    it. vLLM loads an endpoint plugin only if the list names it: those of others stay out unless the user named them.
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
    flag("--zo-kept-states-mib", ZOTrainingConfig, "kept_states_mib", int, "MiB for states below target_layers.")
    group.add_argument(
        "--zo-slowdown",
        type=float,
        default=DEFAULT_SLOWDOWN,
        metavar="FACTOR",
        help="How many times as long training may make what requests wait for: the lower, the slower jobs are beside "
        f"them; 0: no target (default: {DEFAULT_SLOWDOWN}).",
    )
    group.add_argument(
        "--zo-token-budget",
        type=int,
        default=0,
        metavar="TOKENS",
        help="Hard limit: most training tokens in an engine step that also serves, on the average; 0: none (default).",
    )
    flag("--zo-window", ZOTrainingConfig, "window", str, "When jobs run, local time: 22:00-06:00.", metavar="HOURS")
    group.add_argument(
        "--zo-idle-only",
        action=BooleanOptionalAction,
        default=False,
        help="Jobs run only while there are no requests (default: no).",
    )
    flag("--zo-upload-limit-mb", ServerSettings, "upload_limit_mb", int, "Largest file that may be uploaded, in MiB.")
    group.add_argument(
        "--allow-python-graders",
        action=BooleanOptionalAction,
        default=False,
        help="Run Python code that clients send in graders, with the rights of this server (default: no).",
    )
    group.add_argument(
        "--zo-rollout-hosts",
        default="",
        metavar="HOST[:PORT],...",
        help="Hosts to which jobs of clients may post rollouts (default: none).",
    )
    group.add_argument(
        "--zo-rollout-base-url",
        default=None,
        metavar="URL",
        help="This server's address as those hosts reach it (default: from --host and --port).",
    )
    group.add_argument(
        "--zo-keys",
        default=None,
        metavar="FILE",
        help="The file of `vllm-zo keys`: projects with keys of their own (default: none; one key for all).",
    )
    group.add_argument(
        "--zo-print-flags", action="store_true", help="Print the plain vllm serve command that does the same, and stop."
    )


def serve(argv: Sequence[str]) -> None:
    """Run the server until a signal ends it.

    Raises:
        ConfigError: a flag, the model or the state directory cannot work. Raised before the engine starts.
    """
    given = dict(os.environ)
    os.environ["VLLM_PLUGINS"] = plugin_allow_list(os.environ)
    check_vllm()  # before anything is imported from it by name
    moved.find("cli_env_setup")()
    args = parse(argv)
    if args.zo_print_flags:
        chosen = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("VLLM_CPU_", "GOMP_")) and name not in given
        }
        print(as_command(args, argv, chosen))
        return
    # The plugin acquires the directory only when the engine is loaded: an error here saves the minutes until then.
    StateDir(Path(args.zo_state_dir)).acquire().release()
    if args.uds is None:
        check_port(args.host or "", args.port)
    import uvloop
    from vllm import logger as vllm_logger
    from vllm.entrypoints.launchers.api_server.entry import run_server

    from vllm_zo.entrypoints.server.patches import bound_the_start

    if hasattr(vllm_logger, "configure_logging_from_args"):  # 0.30 has no flags for logging yet
        vllm_logger.configure_logging_from_args(args)
    moved.find("validate_parsed_serve_args")(args)
    bound_the_start()
    uvloop.run(run_server(args))


def check_port(host: str, port: int) -> None:
    """Refuse an address on which the server could not listen.

    Raises:
        ConfigError: the port is in use, or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As vLLM does: connections of a server that has just ended must not count as a server.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--host {host or '(all)'} --port {port}: cannot listen there: {error.strerror}. Stop what uses the "
                "port, or choose another with --port."
            ) from None


def parse(argv: Sequence[str]) -> Namespace:
    """vLLM's arguments for its server, with training switched on.

    Raises:
        ConfigError: training cannot work with a flag or with the model.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(
        prog="vllm-zo serve",
        usage="vllm-zo serve MODEL [any vllm serve flag] [--zo-...]",
        description="vLLM's OpenAI-compatible server that also fine-tunes the model it serves.",
    )
    add_flags(parser)
    moved.find("make_arg_parser")(parser)
    args = parser.parse_args(list(argv))
    args.model = args.model_tag or args.model  # vLLM's command does this, not its parser
    # argparse does not tell which flags were given: those whose value differs from the default count as given.
    _switch_training_on(args, {name for name, value in vars(args).items() if value != parser.get_default(name)})
    return args


def _switch_training_on(args: Namespace, given: set[str]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from vllm_zo.entrypoints.llm.options import engine_options
    from vllm_zo.entrypoints.server.plugin import check_arguments, read_keys

    check_arguments(args)
    if args.headless or args.grpc:
        raise ConfigError("--headless and --grpc: training needs the HTTP server in front of its engine; drop them.")
    zo = ZOTrainingConfig(
        slots=args.zo_slots,
        concurrent_jobs=args.zo_concurrent_jobs,
        slot_rank=args.zo_slot_rank,
        slowdown=args.zo_slowdown or None,
        token_budget=args.zo_token_budget or None,
        window=args.zo_window,
        idle_only=args.zo_idle_only,
        kept_states_mib=args.zo_kept_states_mib,
        state_dir=str(Path(args.zo_state_dir).resolve()),
    )
    settings = ServerSettings(
        upload_limit_mb=args.zo_upload_limit_mb,
        allow_python_graders=args.allow_python_graders,
        rollout_hosts=tuple(host for host in args.zo_rollout_hosts.split(",") if host),
        rollout_base_url=args.zo_rollout_base_url,
        keys=None if args.zo_keys is None else str(Path(args.zo_keys).resolve()),
    )
    read_keys(settings, args)  # now, and not when the model is loaded
    engine = {f.name for f in fields(AsyncEngineArgs)} - {"model"}
    options: dict[str, Any] = {name: getattr(args, name) for name in given & engine}
    options.setdefault("max_loras", DEFAULT_MAX_LORAS)
    if is_cpu_build() and args.tensor_parallel_size == args.pipeline_parallel_size == 1:
        # vLLM itself may choose Ray, where this process is one of Ray's.
        options.setdefault("distributed_executor_backend", "uni")
    if (args.data_parallel_size or 1) > 1:
        args.api_server_count = 1  # vLLM's command would start one for each engine
        options = engine_options(args.model, zo, options, seats.SCHEDULER)
    else:
        options = engine_options(args.model, zo, options)
    # As JSON has it: a command line that prints these settings must read as the same ones.
    options["additional_config"][SETTINGS_KEY] = json.loads(json.dumps(asdict(settings)))
    for name, value in options.items():
        setattr(args, name, value)


def as_command(args: Namespace, argv: Sequence[str], variables: Mapping[str, str]) -> str:
    """The plain `vllm serve` command that does the same.

    Args:
        args: the result of `parse(argv)`.
        variables: what `parse` has set in the environment.
    """
    ours = ArgumentParser(add_help=False, allow_abbrev=False)
    add_flags(ours)
    # A parser that knows our flags only leaves vLLM's over, as the user wrote them.
    _, theirs = ours.parse_known_args(list(argv))
    words = [f"VLLM_PLUGINS={os.environ['VLLM_PLUGINS']}", *(f"{name}={value}" for name, value in variables.items())]
    words += ["vllm", "serve", *theirs]
    for name in PRINTED:
        value = getattr(args, name)
        if value is not None:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    words += ["--additional-config", json.dumps(args.additional_config)]
    return shlex.join(words)
