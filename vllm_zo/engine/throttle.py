"""What the operator's settings leave for training: hours, idle only, a token budget, a latency target. No vLLM here."""

from __future__ import annotations

import time
from datetime import datetime

from vllm_zo.config import ZOTrainingConfig
from vllm_zo.engine.admission import UNLIMITED, Credit
from vllm_zo.engine.pacing import EngineStep, Pacer
from vllm_zo.hours import Hours


class Throttle:
    """Answers in tokens. The scheduler tells it of requests that arrive, and of every step.

    Args:
        steps_ahead: see `Pacer`.
    """

    def __init__(self, config: ZOTrainingConfig, steps_ahead: int = 0) -> None:
        self._budget, self._idle_only = config.token_budget, config.idle_only
        self._window = config.window
        self._hours = None if config.window is None else Hours.read("zo_training.window", config.window)
        self._pacer = None if config.slowdown is None else Pacer(config.slowdown, steps_ahead)
        self._credit = Credit()

    @property
    def closed(self) -> str | None:
        """Why jobs may not begin a group at this time of day; None: they may."""
        if self._hours is None or self._hours.contain(datetime.now().time()):
            return None
        return f"zo_training.window={self._window}: jobs run at those hours"

    def beside(self, *, promised: int, largest: int, first_tokens: bool, apart: bool) -> int:
        """Tokens that members which start in this step may use beside requests.

        Args:
            promised: tokens that running members may still use.
            largest: tokens of the largest unit that waits.
            first_tokens, apart: see `Pacer.beside`.
        """
        if self._idle_only:
            return 0
        tokens = float(UNLIMITED)
        if self._budget is not None:
            self._credit.accrue(self._budget, largest + promised)
            tokens = self._credit.amount
        if self._pacer is not None:
            tokens = min(tokens, self._pacer.beside(first_tokens=first_tokens, apart=apart))
        return UNLIMITED if tokens >= UNLIMITED else int(tokens) - promised

    def alone(self, smallest: int, parts: float | None) -> int:
        """Tokens that an engine step without requests may hold. Args: see `Pacer.alone`."""
        return UNLIMITED if self._pacer is None else int(self._pacer.alone(time.monotonic(), smallest, parts))

    @property
    def yields(self) -> bool:
        """Whether a forward for training only should make way for a request that comes."""
        return self._pacer is not None or self._idle_only

    def arrived(self) -> None:
        """Note that a request has arrived."""
        if self._pacer is not None:
            self._pacer.arrived(time.monotonic())

    def begun(self, step: EngineStep, largest: int) -> None:
        """Note what a step holds. Args: largest: see `Credit.accrue`."""
        if step.serves and self._budget is not None:
            self._credit.spend(step.training)
        if self._pacer is not None:
            self._pacer.begun(step, largest)

    def ended(self, step: EngineStep) -> None:
        """Note that a step has ended."""
        if self._pacer is not None:
            self._pacer.ended(step, time.monotonic())

    def stats(self) -> dict[str, float | None]:
        """`Pacer.stats`; nothing without a target."""
        return {} if self._pacer is None else self._pacer.stats(time.monotonic())
