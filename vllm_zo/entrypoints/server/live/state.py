"""Which version of a continual job is live: what its record keeps of it, and the decisions, all pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.jobs.request import LiveRule

MAX_HISTORY = 16
"""How many rollbacks in a row there may be."""


class LiveState(msgspec.Struct, frozen=True):
    """The versions of a job that `live:<job id>` answers with, by their steps.

    Attributes:
        step: the live one; None before the first.
        canary: the one that gets a share of the requests, and is next to go live; None: there is none.
        history: those that were live before, the latest last.
        held: a client has rolled back: nothing goes live by itself until a client promotes a version.
    """

    step: int | None = None
    canary: int | None = None
    history: list[int] = []
    held: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> LiveState:
        return msgspec.convert(record, cls)

    def to_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields

    def goes_live(self, step: int) -> LiveState:
        before = [] if self.step in (None, step) else [self.step]
        canary = None if self.canary == step else self.canary
        return LiveState(step, canary, [*self.history, *before][-MAX_HISTORY:], self.held)

    def promoted(self, step: int) -> LiveState:
        """After a client has promoted a version."""
        live = self.goes_live(step)
        return LiveState(live.step, None, live.history, held=False)

    def rolled_back(self) -> LiveState:
        """After a client has rolled back.

        Raises:
            APIError: 409, no version was live before this one.
        """
        if not self.history:
            raise APIError(409, "No version was live before this one: there is nothing to roll back to.")
        return LiveState(self.history[-1], None, self.history[:-1], held=True)

    def needed(self) -> set[int]:
        """Versions that must not be removed: those that answer, and the one that a rollback leads to."""
        return {step for step in (self.step, self.canary, *self.history[-1:]) if step is not None}


def refusal(
    rule: LiveRule, candidate: Mapping[str, Any] | None, live: Mapping[str, Any] | None, *, compares: bool
) -> str | None:
    """Why a version may not go live; None if it may.

    Args:
        candidate, live: evaluations of the two; the base's where no version is live. None: there was none.
        compares: the job has held-out rows. Without any, every version may.
    """
    if not compares:
        return None
    if candidate is None:
        return "it was not evaluated"
    key = f"eval_{rule.metric}"
    if key not in candidate:
        return f"its evaluation has no metric {rule.metric!r}"
    found, than = candidate[key], None if live is None else live.get(key)
    if found is None or not math.isfinite(found):
        return f"its {rule.metric} is no number"
    if than is None or not math.isfinite(than):
        return None
    worse = found - than if rule.metric == "loss" else than - found
    if worse <= rule.tolerance:
        return None
    return f"its {rule.metric} is {found:.4g}, that of the live one {than:.4g}, and tolerance={rule.tolerance:g}"
