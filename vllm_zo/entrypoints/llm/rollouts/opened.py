"""The rollouts that are being played, each with an address of its own."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_zo import noise
from vllm_zo.commands import SLOT_LORA_ID_BASE
from vllm_zo.entrypoints.llm.rollouts.transcripts import Transcript

PREFIX = "/rollouts/"


@dataclass
class OpenedRollout:
    """A rollout while it is played.

    Attributes:
        model: the name of its probe.
        path: the `lora_path` by which the engine knows the probe.
        seed: the same for all probes of a row; requests get seeds that are derived from it.
        turns: requests so far.
        transcript: takes in what is said; None: nothing is kept of it.
    """

    model: str
    path: str
    seed: int
    turns: int = 0
    transcript: Transcript | None = None
    token: str = field(default_factory=lambda: secrets.token_urlsafe(18))

    @property
    def address(self) -> str:
        """Where the client of the rollout finds the OpenAI API, below the server's own address."""
        return f"{PREFIX}{self.token}/v1"

    def begin_again(self) -> None:
        """Note that the program begins again: it draws the same numbers again."""
        self.turns = 0
        if self.transcript is not None:
            self.transcript.begin()

    def next_seed(self) -> int:
        """The sampling seed of the next request: a function of (job, step, row, turn)."""
        seed = noise.derive_seed(self.seed, "turn", self.turns)
        self.turns += 1
        return seed


class OpenedRollouts:
    """Which rollouts are played. One thread opens and closes them, and another one looks them up."""

    def __init__(self) -> None:
        self._by_token: dict[str, OpenedRollout] = {}

    def open(self, described: Mapping[str, Any], transcript: Transcript | None = None) -> OpenedRollout:
        rollout = OpenedRollout(described["model"], described["path"], described["seed"], transcript=transcript)
        self._by_token[rollout.token] = rollout
        return rollout

    def close(self, rollout: OpenedRollout) -> None:
        del self._by_token[rollout.token]

    def find(self, token: str) -> OpenedRollout | None:
        return self._by_token.get(token)


def probe_requests(names: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Model name -> vLLM's LoRARequest, for (model, `lora_path`) of probes."""
    from vllm.lora.request import LoRARequest

    # The engine knows a probe by its path. The id only has to be one that no adapter of the user has.
    return {model: LoRARequest(model, SLOT_LORA_ID_BASE, path) for model, path in names}
