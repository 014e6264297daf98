"""The latency target without an engine: what a step costs is learned, and training keeps to it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from vllm_zo.engine.admission import UNLIMITED
from vllm_zo.engine.controller import ForwardSoFar
from vllm_zo.engine.pacing import EngineStep, Pacer
from vllm_zo.engine.step_cost import OUTLIER, StepCost

POLL_S = 1e-3
PROMPT, ANSWER = 12, 32
"""Tokens of a request."""


@dataclass
class SimulatedEngine:
    """An engine whose steps take a time that is linear in what they do, with noise, and requests that arrive at random.

    Attributes:
        rate: requests a second.
        unit: training tokens that start together; None: there is no job.
        rows: of the model's layers, if a forward for training only stops after the one in which a request arrives.
        stopped: such a forward.
    """

    rate: float
    slowdown: float = 1.1
    unit: int | None = 34
    most_units: int = 16
    fixed: float = 4e-3
    alone_fixed: float = 6e-3
    decode: float = 0.4e-3
    prefill: float = 0.05e-3
    answer: int = ANSWER
    training: float = 0.12e-3
    alone: float = 0.075e-3
    cold: float = 0.0
    """Seconds that a step that serves takes longer if it follows training."""
    noise: float = 0.1
    seed: int = 0
    steps_ahead: int = 0
    rows: tuple[int, ...] | None = None
    stopped: ForwardSoFar | None = None
    now: float = 0.0
    trained: float = 0.0
    first_tokens: list[float] = field(default_factory=list)
    base: float = 0.0
    """Seconds that the steps that served would have taken without training."""
    real: float = 0.0
    answered: int = 0
    answering: float = 0.0
    """Tokens behind first ones, and seconds between each and the one before, all together."""

    def __post_init__(self) -> None:
        self.after_training = False
        self.rng, self.noises = random.Random(self.seed), random.Random(self.seed + 1)
        self.pacer = Pacer(self.slowdown, self.steps_ahead)
        self.waiting: list[float] = []
        self.running: list[int] = []
        self.next = self._pause()

    def _pause(self) -> float:
        return self.now + self.rng.expovariate(self.rate) if self.rate else float("inf")

    def run(self, seconds: float) -> SimulatedEngine:
        end = self.now + seconds
        while self.now < end:
            self.step()
        return self

    def step(self) -> None:
        while self.next <= self.now:
            self.waiting.append(self.next)
            self.pacer.arrived(self.next)
            self.next += self.rng.expovariate(self.rate)
        step = EngineStep(self.now, len(self.running), PROMPT * len(self.waiting), arrived=self.waiting)
        self.waiting = []
        if self.unit is not None:
            self._train(step, self.unit)
        self.pacer.begun(step, self.unit or 0)
        base = self.fixed + self.decode * step.decode + self.prefill * step.prefill if step.serves else 0.0
        each = self.training if step.serves else self.alone
        extra = each * step.training + (self.alone_fixed if step.training and not step.serves else 0.0)
        extra += self.cold if step.serves and self.after_training else 0.0
        self.after_training = step.training > 0
        noise, begin = self.noises.lognormvariate(0, self.noise), self.now
        self.now += (base + extra) * noise or POLL_S
        self.pacer.ended(step, self.now)
        self.answered += step.decode
        self.answering += step.decode * (self.now - begin)
        self.base, self.real = self.base + base * noise, self.real + ((base + extra) * noise if step.serves else 0.0)
        self.trained += step.training
        self.running = [left - 1 for left in [*self.running, *[self.answer] * len(step.arrived)] if left > 1]
        self.first_tokens += [self.now - arrival for arrival in step.arrived]

    def _train(self, step: EngineStep, unit: int) -> None:
        """Decide what the step trains."""
        if step.serves:
            tokens = self.pacer.beside(first_tokens=bool(step.arrived))
        else:
            tokens = self.pacer.alone(self.now, unit, self.rows and sum(self.rows) / max(self.rows))
        whole = unit * min(int(tokens // unit), self.most_units)
        if self.rows is None or (self.stopped is None and step.serves):
            step.training = whole
            return
        forward = self.stopped or ForwardSoFar(whole, self.rows)
        step.left, layers = forward.left, forward.within(int(tokens))
        if not step.serves:
            until = self.next - self.now - self.alone_fixed
            layers = next((n for n in range(len(self.rows)) if self.alone * forward.cost(n) >= until), len(self.rows))
        step.training = forward.cost(layers)
        forward = replace(forward, reached=forward.reached + layers)
        self.stopped = forward if forward.left else None

    def percentile(self, share: float) -> float:
        return sorted(self.first_tokens)[int(share * len(self.first_tokens))]


def saturation(**costs: float) -> float:
    """Requests a second at which 16 of them always run."""
    engine = SimulatedEngine(1.0, **costs)
    return 16 / (ANSWER * (engine.fixed + engine.decode * 16))


# --- what a step costs ------------------------------------------------------------------------------------------------


def test_the_cost_of_a_step_is_learned_and_what_is_no_longer_seen_is_kept() -> None:
    cost, rng = StepCost(3), random.Random(0)

    def learn(prefill: int) -> None:
        amounts = (1, rng.randint(1, 20), prefill)
        cost.learn(amounts, (5e-3 + 0.4e-3 * amounts[1] + 0.1e-3 * prefill) * rng.uniform(0.9, 1.1))

    for _ in range(300):
        learn(prefill=rng.choice([0, 0, 0, 12, 100]))
    assert cost.seconds((1, 10, 0)) == pytest.approx(9e-3, rel=0.05)
    for _ in range(3000):
        learn(prefill=0)
    assert cost.seconds((1, 10, 0)) == pytest.approx(9e-3, rel=0.05)
    assert cost.seconds((1, 1, 500)) == pytest.approx(55.4e-3, rel=0.15), "no prefill was seen for 3,000 steps"


def test_a_step_that_took_far_too_long_counts_a_few_times_its_cost() -> None:
    cost = StepCost(2)
    for tokens in range(100):
        cost.learn((1, tokens), 1e-3 + 1e-4 * tokens)
    before = cost.seconds((1, 50))
    cost.learn((1, 50), 10.0)
    assert before < cost.seconds((1, 50)) < before * (1 + 2 * OUTLIER / 100)


def test_most_is_how_many_tokens_end_in_time() -> None:
    cost = StepCost(2)
    assert not cost.known and cost.most(1.0) > 1e6
    for tokens in range(10, 110):
        cost.learn((1, tokens), 7e-3 + 1e-4 * tokens)
    assert cost.most(12e-3) == pytest.approx(50, rel=0.02)
    assert cost.most(6e-3) == 0


# --- steps that serve -------------------------------------------------------------------------------------------------


# Not shrunk: every example is half a minute of a simulated engine.
@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    share=st.floats(0.2, 0.8),
    slowdown=st.sampled_from([1.05, 1.1, 1.5]),
    unit=st.integers(4, 80),
    fixed=st.floats(1e-3, 1e-2),
    decode=st.floats(1e-5, 1e-3),
    training=st.floats(1e-5, 3e-4),
    seed=st.integers(0, 99),
)
def test_steps_that_serve_take_as_much_longer_as_the_target_says_and_not_more(
    share: float, slowdown: float, unit: int, fixed: float, decode: float, training: float, seed: int
) -> None:
    costs = {"fixed": fixed, "decode": decode}
    engine = SimulatedEngine(share * saturation(**costs), slowdown, unit, training=training, seed=seed, **costs)
    engine.run(10)
    before = engine.real, engine.base
    engine.run(20)
    slower = (engine.real - before[0]) / (engine.base - before[1])
    assert slower < 1 + 1.25 * (slowdown - 1)
    assert engine.pacer.stats(engine.now)["slowdown"] == pytest.approx(slower, abs=0.05)


def test_a_job_moves_beside_traffic_that_never_stops() -> None:
    engine = SimulatedEngine(0.9 * saturation()).run(20)
    slower, trained, seconds = engine.real / engine.base, engine.trained, engine.now
    assert slower > 1.03
    with_one = (engine.fixed + engine.decode) / (engine.fixed + engine.decode * 16)
    assert trained * engine.training == pytest.approx(0.1 * with_one * seconds, rel=0.35), "a tenth of such a step"


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_tokens_come_as_much_later_as_the_target_says_though_more_requests_are_under_way(share: float) -> None:
    """Three runs of a minute: which requests are together is chance. A tenth of whole steps would give 1.15, 1.19."""

    def between_tokens(unit: int | None) -> float:
        engines = [SimulatedEngine(share * saturation(), unit=unit, seed=seed).run(60) for seed in range(3)]
        return sum(e.answering for e in engines) / sum(e.answered for e in engines)

    assert between_tokens(34) / between_tokens(None) == pytest.approx(1.1, abs=0.03)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_what_training_adds_to_the_step_after_it_counts_as_its_cost(share: float) -> None:
    engine = SimulatedEngine(share * saturation(), cold=3e-3).run(30)
    before = engine.real, engine.base, engine.trained
    engine.run(60)
    slower = (engine.real - before[0]) / (engine.base - before[1])
    assert 1.02 < slower < 1.12 and engine.trained > before[2]
    assert engine.pacer.stats(engine.now)["slowdown"] == pytest.approx(slower, abs=0.02)


def test_a_job_moves_beside_requests_of_one_token() -> None:
    """Between two of them there is always a forward for training only: no step shows what serving costs by itself."""
    engine = SimulatedEngine(5.0, answer=1, prefill=1e-3).run(60)
    slowdown, trained = engine.pacer.stats(engine.now)["slowdown"], engine.trained
    assert slowdown == pytest.approx(1.0, abs=0.05)
    assert engine.run(10).trained > trained


def test_when_the_engine_becomes_slower_the_target_holds_again_after_seconds() -> None:
    engine = SimulatedEngine(0.3 * saturation()).run(60)
    engine.training *= 3
    engine.run(20)
    engine.base = engine.real = 0.0
    engine.run(60)
    assert 1.05 < engine.real / engine.base < 1.12


# --- forwards for training only ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_request_waits_for_no_more_than_the_shortest_forward_while_others_come(share: float) -> None:
    rate = share * saturation()
    without, beside = (SimulatedEngine(rate, unit=unit).run(60) for unit in (None, 34))
    shortest = beside.alone_fixed + beside.alone * 34
    for quantile in (0.5, 0.9, 0.99):
        assert beside.percentile(quantile) < without.percentile(quantile) + shortest
    assert beside.trained > 0


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_forward_that_stops_between_layers_uses_the_idle_time_and_a_request_waits_for_one_layer(share: float) -> None:
    rate = share * saturation()
    without, beside = (SimulatedEngine(rate, unit=unit, rows=(34,) * 6).run(30) for unit in (None, 34))
    for quantile in (0.5, 0.9, 0.99):
        assert beside.percentile(quantile) < without.percentile(quantile) + beside.alone_fixed + 2e-3
    stats = beside.pacer.stats(beside.now)
    assert stats["idle_used"] is not None and stats["idle_used"] > 0.7
    assert stats["stops"] and stats["slowdown"] == pytest.approx(1.08, abs=0.04)


def test_layers_below_the_first_trained_one_cost_their_rows() -> None:
    forward = ForwardSoFar(300, rows=(0, 0, 10, 20))
    assert (forward.left, forward.next, forward.within(0), forward.within(99)) == (300, 100, 2, 2)
    assert (forward.within(100), forward.cost(3), forward.within(300)) == (3, 100, 4)
    stopped = replace(forward, reached=3)
    assert (stopped.left, stopped.next, stopped.within(199), stopped.within(200)) == (200, 200, 0, 1)
    assert ForwardSoFar(100, rows=(7, 7, 7)).next == 34, "rounded up"


def test_a_request_waits_for_one_layer_where_the_lower_ones_have_no_rows() -> None:
    """The last of 30 layers costs as much as the whole forward: it may be as long as any layer."""

    def largest(rows: tuple[int, ...]) -> float:
        engine = SimulatedEngine(3.0, rows=rows, unit=10, fixed=20e-3).run(60)
        tokens = engine.pacer.alone(engine.now, 10, sum(rows) / max(rows))
        return tokens * max(rows) / sum(rows) * engine.alone

    every, last = largest((10,) * 30), largest((0,) * 29 + (10,))
    assert 0 < last == pytest.approx(every, rel=0.5)


def test_long_answers_to_the_first_token_give_room_for_longer_forwards() -> None:
    engine = SimulatedEngine(0.5, fixed=0.2, decode=0.0).run(300)
    assert engine.pacer.patience_s == pytest.approx(0.1 * sorted(engine.first_tokens)[-7], rel=0.2)
    assert engine.pacer.alone(engine.now, 34) > 100


def test_on_a_quiet_engine_a_forward_may_be_as_long_as_it_likes() -> None:
    engine = SimulatedEngine(5.0).run(60)
    assert engine.pacer.alone(engine.now, 34) == 34
    assert engine.pacer.alone(engine.now + 60, 34) > 34 * 16
    assert engine.pacer.alone(engine.now + 3600, 34) == UNLIMITED
    assert SimulatedEngine(0.0).run(1).pacer.stats(1.0)["slowdown"] is None


def test_with_steps_ahead_a_request_waits_for_all_of_them() -> None:
    engines = [SimulatedEngine(0.5, fixed=0.2, decode=0.0, steps_ahead=ahead).run(300) for ahead in (0, 1)]
    whole, half = (engine.pacer.alone(engine.now, 34) for engine in engines)
    assert half * 0.075e-3 + 6e-3 == pytest.approx((whole * 0.075e-3 + 6e-3) / 2, rel=0.25)


def test_a_machine_that_has_other_things_to_do_is_no_slowdown_by_training() -> None:
    engine = SimulatedEngine(10.0, unit=None)
    for number in range(8000):
        if number % 50 == 0:
            engine.fixed *= 30
        engine.step()
        if number % 50 == 0:
            engine.fixed /= 30
    assert engine.pacer.stats(engine.now)["slowdown"] == pytest.approx(1.0, abs=0.03)


def test_metrics_show_the_share_of_the_idle_time_that_was_used() -> None:
    engine = SimulatedEngine(4.0).run(30)
    used = engine.pacer.stats(engine.now)["idle_used"]
    assert used is not None and used > 0.8
    engine.unit = None
    engine.run(180)
    assert engine.pacer.stats(engine.now)["idle_used"] == pytest.approx(0, abs=0.06)
