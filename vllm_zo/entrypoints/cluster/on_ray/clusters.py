"""The clusters of a Ray cluster, as any of its machines sees them: `vllm-zo status`, `vllm-zo stop`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import ray

from vllm_zo.entrypoints.cluster.on_ray.connect import NAMESPACE, connect
from vllm_zo.errors import ConfigError

ANSWER_S = 20.0
"""How long a coordinator may take to answer, in seconds: one that was killed is started again meanwhile."""


def statuses(address: str) -> Iterator[dict[str, Any]]:
    """What each coordinator says of itself (`CoordinatorActor.status`); `error` where it does not answer."""
    connect(address)
    for name in _names():
        try:
            yield ray.get(ray.get_actor(name, NAMESPACE).status.remote(), timeout=ANSWER_S)
        except (ray.exceptions.RayError, ValueError) as error:
            yield {"cluster": name, "error": str(error).strip().splitlines()[0]}


def as_text(status: dict[str, Any]) -> str:
    """A status as one line."""
    if "error" in status:
        return f"{status['cluster']}  does not answer: {status['error']}"
    up = sum(state == "up" for state in status["engines"].values())
    loss = f", loss {status['loss']:.4f}" if status.get("loss") is not None else ""
    job = "no job"
    if "job" in status:
        job = f"{status['status']}, step {status['step']}/{status['steps']}{loss}  {status['job']}"
    return f"{status['cluster']}  {up}/{len(status['engines'])} engines  {job}"


def stop(address: str, name: str | None, *, cancel: bool) -> tuple[str, str]:
    """End the job of a cluster, and the cluster with it; wait for that.

    Args:
        name: of the cluster; None: the only one.
        cancel: at once; else the job takes no further step, evaluates and succeeds.

    Returns:
        The name, and what has become of the cluster.

    Raises:
        ConfigError: there is no such cluster, or several and no name.
    """
    connect(address)
    names = _names()
    if not names:
        raise ConfigError(f"ray={address!r}: no job runs there.")
    if name is None and len(names) > 1:
        raise ConfigError(f"several clusters: {', '.join(names)}; name one of them.")
    if name is not None and name not in names:
        raise ConfigError(f"{name!r}: no such cluster; there {'is' if len(names) == 1 else 'are'} {', '.join(names)}.")
    name = name or names[0]
    if ray.get(ray.get_actor(name, NAMESPACE).leave.remote(cancel)):
        return name, "its job ends; the program that began it gets the result, and ends the engines"
    while any(other.split("/")[0] == name for other in _all()):
        time.sleep(0.1)
    return name, "ended"


def _names() -> list[str]:
    return sorted(name for name in _all() if "/" not in name)


def _all() -> list[str]:
    """Names of all our actors that have not died."""
    return [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
