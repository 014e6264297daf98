"""How much training an engine step may hold, so that requests keep their latency. No vLLM here.

A target says how much longer training may make what requests wait for: 1.1 is a tenth. It becomes tokens in two ways.

*A step that serves.* The pacer learns what a step costs without training, from the steps that have none and follow
none, and what a training token adds, from the others (`step_cost.py`). Of what it adds a part falls on the next step,
which finds in the caches what training has left there. Every step that serves adds (target - 1) times the cost of a
step *with one request* to a credit of seconds; training tokens beside requests are paid from it. Not the cost of the
step as it is: while steps are longer, more requests are under way at once. A step takes a + b n seconds with n
requests, and n = r T where r tokens a second are asked for; so T = a / (1 - b r). With (target - 1) a for training in
each step all of it grows by the target, and so does the time between tokens. A tenth of a + b n would make it
1.1 (1 - b r) / (1 - 1.1 b r) times as long: 1.22 where b r is one half.

*A forward for training only.* A request that arrives meanwhile waits for its end; or, where it can stop between layers,
for the end of one layer. That wait must be short, and so the forward is cut:

- It may take (target - 1) times what the slowest of the latest requests needed from arrival to first token anyway. Then
  the slowest ones, even if all of them met it, stay within the target.
- The shortest that there is, a single pair, may also run where fewer than (target - 1) requests are expected within it
  at the rate seen.
- Any may run where fewer than 0.01 are: on an engine that hardly anybody uses.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from vllm_zo.engine.admission import UNLIMITED, Credit
from vllm_zo.engine.step_cost import ENOUGH, OUTLIER, StepCost

EXPECTED = 0.01
"""Any training-only forward may run where at most so many requests are expected within it."""
SLOWEST = 0.95
"""The quantile of the times to the first token that counts as "the slowest": the last few may be accidents."""
RATE_S = 10.0
"""The rate of requests is that of about so many seconds."""
QUIET = 1e-4
"""Requests a second that count as none: two minutes after the last one."""
SHOWN_S = 60.0
"""Metrics show about so many seconds."""
LATEST = 128
"""The requests whose time to the first token counts."""
GUESSED = 500
"""Training tokens that the first guess of their cost counts for beside those measured, to begin with."""
ONE_REQUEST = (1, 1, 0)
"""What a step does that has one token of one request in it (`EngineStep.amounts`)."""
MAX_HELD = 8
"""How many steps in a row training stays out of because a request waits for its first token in them."""
MAX_MIXED = 16
"""After so many steps that serve in a row, each with training in it or in the one before, training stays out of two:
the second one shows what serving costs by itself. Where there is none such, because no two steps that serve follow
each other, those behind training must do after twice as many."""


class Recent:
    """A sum that forgets: an amount counts 1/e after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._sum, self._at = 0.0, 0.0

    def add(self, amount: float, now: float) -> None:
        self._sum, self._at = self.at(now) + amount, now

    def at(self, now: float) -> float:
        return self._sum * math.exp(-max(now - self._at, 0.0) / self.seconds)


@dataclass
class EngineStep:
    """What the engine was given to do in one step.

    Attributes:
        start: when it was scheduled, in seconds of a clock that never goes back.
        decode: requests that have one token in it.
        prefill: tokens of the other requests.
        training: training tokens. Of a forward that stops between layers, each layer that runs counts its share.
        left: the training tokens of a forward of members alone that are left when the step begins.
        arrived: when the requests arrived whose first tokens it computes, same clock.
    """

    start: float
    decode: int = 0
    prefill: int = 0
    training: int = 0
    left: int = 0
    arrived: list[float] = field(default_factory=list)

    @property
    def serves(self) -> bool:
        return self.decode + self.prefill > 0

    @property
    def amounts(self) -> tuple[int, int, int]:
        return (1, self.decode, self.prefill)


class Pacer:
    """Turns the target into tokens, step by step. The scheduler tells it of every step, when it begins and ends.

    Args:
        slowdown: the target, > 1.
        steps_ahead: how many steps the engine schedules before the one that runs has ended; a request waits for all.
    """

    def __init__(self, slowdown: float, steps_ahead: int = 0) -> None:
        self._more = slowdown - 1
        self._steps_ahead = steps_ahead
        self._serving, self._alone = StepCost(3), StepCost(2)
        self._beside = [0.0, 0.0]
        """Seconds that training tokens have added to steps that serve, and those tokens; the latest count most."""
        self._credit = Credit()
        self._apart = False
        self._held = 0
        self._trained_before: EngineStep | None = None
        """The step that has ended last, if training ran in it."""
        self._mixed = 0
        """Steps that serve since the last one with no training in it nor in the one before."""
        self._requests = Recent(RATE_S)
        self._first_tokens: deque[float] = deque(maxlen=LATEST)
        self._ended = self._alone_from = self._alone_to = -math.inf
        self._base, self._real = Recent(SHOWN_S), Recent(SHOWN_S)
        self._served, self._trained, self._passed = Recent(SHOWN_S), Recent(SHOWN_S), Recent(SHOWN_S)
        self._stops = Recent(SHOWN_S)
        self.budget = 0.0
        """Training tokens that the last step might have held (for the metrics)."""

    # --- how much may run ---------------------------------------------------------------------------------------------

    def beside(self, *, first_tokens: bool, apart: bool = False) -> float:
        """Training tokens that this step may hold beside requests.

        Args:
            first_tokens: a request waits for its first token in this step.
            apart: training tokens run in a forward of their own, and not in one with those of requests.
        """
        self._apart = apart
        self.budget = self._beside_tokens(first_tokens)
        return self.budget

    def _beside_tokens(self, first_tokens: bool) -> float:
        if not self._serving.known or 0 <= self._mixed - MAX_MIXED < 2 + self._steps_ahead:
            return 0.0
        if first_tokens and self._held < MAX_HELD:
            self._held += 1
            return 0.0
        self._held = 0
        return max(self._credit.amount, 0.0) / self.token_s

    def alone(self, now: float, smallest: int, parts: float | None = None) -> float:
        """Training tokens that a forward without requests may hold.

        Args:
            smallest: tokens of the smallest unit that waits.
            parts: how many times as much as its largest part the whole forward is, if it stops after the part in which
                a request arrives; None if it does not.
        """
        self.budget = UNLIMITED
        rate = self._requests.at(now) / RATE_S
        if self._alone.known and rate > QUIET:
            longest_s = max(self.patience_s, EXPECTED / rate) / (1 + self._steps_ahead)
            # A part has nothing of the fixed cost, which stands before the forward and behind it.
            fixed, parts = (1, 1.0) if parts is None else (0, parts)
            self.budget = parts * self._alone.most(longest_s, fixed)
            if self._alone.seconds((fixed, smallest / parts)) * rate < self._more:
                self.budget = max(self.budget, smallest)
        return self.budget

    @property
    def patience_s(self) -> float:
        """How long a request may wait for a training-only forward, in seconds."""
        if len(self._first_tokens) < ENOUGH:
            return 0.0
        return self._more * sorted(self._first_tokens)[int(SLOWEST * len(self._first_tokens))]

    @property
    def token_s(self) -> float:
        """Seconds that a training token adds to a step that serves."""
        guess = self._guess_token_s()
        seconds, tokens = self._beside
        # In a forward of its own a token costs what it costs alone. What steps with training seem to take longer is
        # less: of steps that serve only there are few then, and most of them follow training, with cold caches.
        least = guess if self._apart else guess / 10
        return max(seconds / tokens if tokens else guess, least)

    def _guess_token_s(self) -> float:
        """What a training token may add, before there is a step that shows it."""
        if self._alone.known:
            return max(self._alone.seconds((1, GUESSED)) / GUESSED, 1e-7)
        return max(self._serving.seconds((0, 0, 1)), 1e-7)

    # --- what happened ------------------------------------------------------------------------------------------------

    def arrived(self, now: float) -> None:
        """Note that a request has arrived."""
        self._requests.add(1, now)

    def begun(self, step: EngineStep, largest: int) -> None:
        """Note what a step holds: it adds to the credit, and pays from it.

        Args:
            largest: see `Credit.accrue`, in tokens.
        """
        if not step.serves:
            return
        self._credit.spend(step.training * self.token_s)
        if self._serving.known:
            self._credit.accrue(self._more * self._serving.seconds(ONE_REQUEST), largest * self.token_s)

    def ended(self, step: EngineStep, now: float) -> None:
        """Note that a step has ended: learn from the time it took."""
        begin = max(step.start, self._ended)  # with steps ahead it began when the one before had ended
        seconds = now - begin
        if math.isfinite(self._ended):
            self._passed.add(now - self._ended, now)
        self._ended = now
        before, self._trained_before = self._trained_before, step if step.training else None
        if step.serves:
            self._served.add(seconds, now)
            self._learn_serving(step, before, seconds, now)
        elif step.training:
            self._trained.add(seconds, now)
            self._alone.learn((1, step.training), seconds)
            self._alone_from, self._alone_to = begin, now
        if not step.serves and step.training < step.left:
            self._stops.add(1, now)
        for arrival in step.arrived:
            # Without the time that it waited for training only: the target is about the time without training.
            waited = max(self._alone_to - max(arrival, self._alone_from), 0.0)
            self._first_tokens.append(max(now - arrival - waited, 0.0))

    def _learn_serving(self, step: EngineStep, before: EngineStep | None, seconds: float, now: float) -> None:
        """Learn from a step that served.

        Args:
            before: the step before, if training ran in it.
        """
        self._mixed = self._mixed + 1 if step.training or before else 0
        if self._serving.known:
            base = self._serving.seconds(step.amounts)
            # An accident of the machine is cut off here as it is in what `base` was learned from.
            seconds = min(seconds, OUTLIER * (base + step.training * self.token_s))
            self._base.add(base, now)
            self._real.add(seconds, now)
            if step.training or (before and before.serves):
                self._learn_added(step.training, seconds - base)
        if self._shows_serving(step, before):
            self._serving.learn(step.amounts, seconds)

    def _learn_added(self, tokens: int, seconds: float) -> None:
        """Learn what training tokens have added to a step. 0 tokens: what the step before has left in the caches."""
        total = self._beside if self._beside[1] else [self._guess_token_s() * GUESSED, GUESSED]
        keep = 0.98 if tokens else 1.0
        self._beside = [keep * total[0] + seconds, keep * total[1] + tokens]

    def _shows_serving(self, step: EngineStep, before: EngineStep | None) -> bool:
        """Whether the time of this step is what serving costs by itself."""
        if step.training:
            return False
        if before is None or not self._serving.known:
            return True
        # Behind training the caches are cold. Beside a job that uses every pause all prefills are behind training.
        return step.prefill > 0 or self._mixed > 2 * MAX_MIXED

    # --- metrics ------------------------------------------------------------------------------------------------------

    def stats(self, now: float) -> dict[str, float | None]:
        """For monitoring, over about the last minute.

        Returns:
            budget_tokens: training tokens that the last step might have held; None where nothing limits them.
            slowdown: how many times as long as without training the steps that served took; None: none did.
            idle_used: the share of the time without requests in which training ran; None: there was no such time.
            stops: how often training stopped between two layers because a request came.
        """
        base, idle = self._base.at(now), self._passed.at(now) - self._served.at(now)
        return {
            "budget_tokens": None if self.budget >= UNLIMITED else self.budget,
            "slowdown": self._real.at(now) / base if base > 0 else None,
            "idle_used": min(self._trained.at(now) / idle, 1.0) if idle > 1e-3 else None,
            "stops": self._stops.at(now),
        }
