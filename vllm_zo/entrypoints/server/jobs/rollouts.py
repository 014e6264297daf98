"""Rollouts of jobs that clients have created: programs behind URLs play them, on hosts that the server allows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vllm_zo.entrypoints.llm.rollouts.exchange import playing
from vllm_zo.entrypoints.llm.rollouts.opened import OpenedRollouts
from vllm_zo.entrypoints.server.models.vllm_models import Serving
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives import Objective, Rollout


@dataclass(frozen=True)
class ServedRollouts:
    """Plays the rollouts of jobs.

    Args:
        client: calls the engine's `zo_*` methods.
        server: this server's address as programs reach it, without a path.
    """

    client: Any
    serving: Serving
    opened: OpenedRollouts
    server: str

    @asynccontextmanager
    async def of_job(self, directory: JobDir, owner: str) -> AsyncIterator[None]:
        """In the block, the job's rollouts are played, if it has any.

        Args:
            owner: the job's project.

        Raises:
            OSError: the job's files cannot be read.
        """
        objective = (await asyncio.to_thread(directory.read_description)).config.objective
        if not isinstance(objective, Rollout):
            yield
            return

        def serve(probes: Iterable[tuple[str, str]]) -> None:
            self.serving.serve_probes(directory.job_id, probes, owner)

        async with playing(self.client, directory, objective, self.opened, self.server, serve):
            yield


def check_host(objective: Objective, allowed: tuple[str, ...]) -> None:
    """Refuse a job that would post to a host which the server was not started for.

    Args:
        allowed: "host" or "host:port" of each; "host" allows all its ports.

    Raises:
        ConfigError: the host of the objective's URL is none of them; or it sets what only `LLM.finetune` can.
    """
    if not isinstance(objective, Rollout) or objective.url is None:
        return
    parts = urlsplit(objective.url)
    with_port = f"{parts.hostname}:{parts.port or {'http': 80, 'https': 443}[parts.scheme]}"
    if parts.hostname not in allowed and with_port not in allowed:
        raise ConfigError(
            f"url={objective.url!r}: this server posts rollouts to {', '.join(allowed) or 'no host'} only; the flag "
            f"--zo-rollout-hosts {parts.hostname} allows it."
        )
    if objective.server:
        raise ConfigError("server: the rollouts of this job ask this server, which has its own settings; leave it out.")
