"""The Ray cluster on which engines are to run: whether it is there, and how much of it each engine gets."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_zo.entrypoints.cluster.devices import is_foreign
from vllm_zo.entrypoints.llm.cpu_defaults import is_cpu_build
from vllm_zo.errors import ConfigError

NAMESPACE = "vllm_zo"
"""Of all our actors: every job of the Ray cluster sees them under one name."""
PASSED_ON = ("VLLM_", "HF_", "TRANSFORMERS_")
"""Variables of the driver that engines get, as with vLLM's own Ray executor."""
FIND_S = 5.0
"""How long to wait for a machine at an address, in seconds. Ray itself waits for minutes."""


@dataclass(frozen=True)
class Share:
    """What an engine takes of its node.

    Attributes:
        neighbours: the most engines that one node may have.
    """

    cpus: int
    gpus: int
    neighbours: int


def require_ray() -> None:
    """Raises ConfigError: Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("ray: is not installed; pip install 'vllm-zo[ray]'.")


def connect(address: str) -> None:
    """Make this process a driver of the Ray cluster at `address`, unless it is one of some Ray cluster already.

    Args:
        address: "auto" (the variable RAY_ADDRESS, or the cluster that this machine is part of), "HOST:PORT", or
            "local" (a new one on this machine, which ends with this process).

    Raises:
        ConfigError: Ray is not installed, or there is no cluster that takes this process.
    """
    require_ray()
    import ray

    if ray.is_initialized():
        return
    if address.startswith("ray://"):
        raise ConfigError(
            f"ray={address!r}: a Ray client has no files of the cluster; run this on one of its machines with "
            "ray='auto', or by `ray job submit`."
        )
    _find(address)
    # Ray's lines say what ours say; its warnings, and what engines print, are shown.
    options: dict[str, Any] = {"logging_level": logging.WARNING, "namespace": NAMESPACE}
    if address == "local":
        options["include_dashboard"] = False
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(f"ray={address!r}: no Ray cluster there: {_first_line(error)} {_START}") from error


_START = "Start one with `ray start --head`, and join it on other machines with `ray start --address=HOST:6379`."


def _find(address: str) -> None:
    if address in ("auto", "local"):
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise ConfigError(f"ray={address!r}: expected 'auto', 'local' or 'HOST:PORT', e.g. '10.0.0.1:6379'.")
    try:
        socket.create_connection((host, int(port)), FIND_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"ray={address!r}: no Ray cluster there: {error}. {_START}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


# --- what an engine gets ----------------------------------------------------------------------------------------------


def share_of(engines: int, ranks: int) -> Share:
    """What each of `engines` gets of the nodes that are here now.

    Args:
        ranks: workers of an engine, tensor-parallel ranks and pipeline stages. All of them are on one node.

    Raises:
        ConfigError: there are fewer GPUs (on a CPU build: CPUs) than the engines need.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return fit(nodes, engines, ranks, "CPU" if is_cpu_build() else "GPU")


def fit(nodes: Sequence[Mapping[str, float]], engines: int, ranks: int, what: str) -> Share:
    """`share_of` for nodes with these resources."""
    have = [int(node.get(what, 0)) for node in nodes]
    # The largest equal share of which there are enough. A GPU engine takes no more than its ranks need.
    most = max(have, default=0) if what == "CPU" else ranks
    for each in range(most, ranks - 1, -1):
        if sum(number // each for number in have) >= engines:
            neighbours = min(engines, max(number // each for number in have))
            return Share(each, 0, neighbours) if what == "CPU" else Share(1, ranks, neighbours)
    raise ConfigError(
        f"engines={engines} of {ranks} {what}{'s' * (ranks > 1)} each: the Ray cluster has {sum(have)} {what}s on "
        f"{len(nodes)} node{'s' * (len(nodes) != 1)} ({', '.join(map(str, have))}); start fewer engines, or add nodes."
    )


def environment(share: Share, ranks: int) -> dict[str, str]:
    """The variables of an engine's process that must be set before Python starts."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_ON) and not name.startswith("VLLM_HOST_") and not is_foreign(name)
    }
    # The engine's loop and its messages share one thread, so that a kill ends the whole engine and nothing else.
    passed["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if share.gpus == 0:
        # Ray counts CPUs and names none: the system places the threads.
        passed |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(share.cpus // ranks)}
    return passed
