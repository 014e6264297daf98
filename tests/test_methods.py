"""What every method owes (one table, shared properties), and each against a naive dense float64 version.

The problem is small enough to differentiate by hand: two linear modules, quadratic or linear losses of their weights.
"""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import change_of
from vllm_zo import noise
from vllm_zo.errors import ConfigError
from vllm_zo.methods import ESTIMATORS, METHODS, FactorizedMeZO, LoZO, Method, MeZOLoRA
from vllm_zo.methods.fold import fold_into
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.methods.plan import ModuleShape, ProbePlan
from vllm_zo.methods.schedules import LRSchedule, learning_rate_at
from vllm_zo.methods.spaces import basis_of
from vllm_zo.methods.state import AdapterState
from vllm_zo.registry import settings

MODULES = (ModuleShape("layers.0.q_proj", 5, 4), ModuleShape("layers.0.fc1", 3, 6))
EXAMPLES = 3
JOB_SEED = 11
GUIDE = Path(__file__).parents[1] / "docs" / "adding-a-method.md"

Weights = list[Tensor]
Loss = Callable[[Weights], Tensor]
"""Weights of MODULES, float64 -> (EXAMPLES,) float64 losses."""


def example_of_the_guide(directory: Path) -> ModuleType:
    """The python block of the guide, imported as a module (pickling wants one)."""
    block = GUIDE.read_text().split("```python\n")[1].split("```")[0]
    path = directory / "guide_example.py"
    path.write_text(block)
    spec = importlib.util.spec_from_file_location("guide_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["guide_example"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def guide_example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The guide's estimator is known by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ESTIMATORS, "_registered", dict(ESTIMATORS._registered))
        ESTIMATORS.register(example_of_the_guide(tmp_path_factory.mktemp("guide")).MedianOfDirections)
        yield


@dataclass(frozen=True)
class Case:
    """A row of the table: a method by name, and a step size for the quadratic.

    Attributes:
        reach: of the distance to what is within reach, the share that may be left at the end.
        gain: `E[estimate] = gain * gradient` in weight space, over directions and bases; None: the estimate is
            normalised, or not linear in the loss.
    """

    name: str
    hyperparameters: dict[str, Any]
    learning_rate: float
    steps: int = 250
    reach: float = 0.2
    gain: float | None = 1.0

    def build(self) -> Method:
        built: Method = METHODS.build(self.name, **self.hyperparameters)
        return built


SHORT = {"rank": 2, "interval": 5}
CASES = {
    "lozo": Case("lozo", SHORT, learning_rate=0.01, gain=2.0),
    "lozo, 3 queries": Case("lozo", {"rank": 1, "interval": 7, "queries": 3}, learning_rate=0.04),
    "lozo, one-sided": Case("lozo", SHORT | {"queries": 4, "estimator": "one-sided"}, learning_rate=0.02, gain=2.0),
    "lozo, leave one out": Case("lozo", SHORT | {"queries": 4, "estimator": "rloo"}, learning_rate=0.01, gain=2.0),
    "lozo, z-scored": Case("lozo", SHORT | {"queries": 4, "estimator": "z-score"}, learning_rate=20.0, gain=None),
    "lozo-m": Case("lozo", SHORT | {"optimizer": "momentum"}, learning_rate=0.015, gain=None, reach=0.35),
    "lozo, adam": Case(
        "lozo", SHORT | {"optimizer": {"name": "adam", "beta2": 0.9}}, learning_rate=0.08, gain=None, reach=0.5
    ),
    "lozo, meazo": Case("lozo", SHORT | {"optimizer": "meazo"}, learning_rate=0.05, gain=None),
    "lozo, sign": Case("lozo", SHORT | {"optimizer": "sign"}, learning_rate=0.03, gain=None, reach=0.3),
    "lozo, muon": Case("lozo", SHORT | {"queries": 2, "optimizer": "muon"}, learning_rate=0.05, gain=None),
    "factorized-mezo": Case("factorized-mezo", {"rank": 8}, learning_rate=0.02),
    "factorized-mezo, 2 queries": Case("factorized-mezo", {"rank": 5, "queries": 2}, learning_rate=0.03),
    "fzoo": Case("fzoo", {"interval": 5}, learning_rate=1e-4, gain=None),
    "kerzoo": Case("kerzoo", SHORT, learning_rate=0.0015, gain=2.0, steps=400, reach=0.3),
    "eggroll": Case("eggroll", {"queries": 3}, learning_rate=40.0, gain=None),
    "tezo": Case("tezo", {"rank": 3}, learning_rate=0.01, gain=3.0),
    "tezo, adam": Case("tezo", {"rank": 3, "optimizer": "adam"}, learning_rate=0.02, gain=None),
    "subzero": Case("subzero", SHORT, learning_rate=0.004, gain=1.0, steps=500),
    "zo-muon": Case("zo-muon", SHORT, learning_rate=0.08, gain=None),
    "lora-fa": Case("lora-fa", {"rank": 2}, learning_rate=0.008, gain=None),
    "mezo-lora": Case("mezo-lora", {"rank": 2}, learning_rate=0.001, gain=None, steps=600),
    "mezo": Case("mezo", {}, learning_rate=0.02),
    "the guide's example": Case("lozo", SHORT | {"queries": 3, "estimator": "median"}, learning_rate=0.01, gain=None),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def method(case: Case, guide_example: None) -> Method:
    return case.build()


@pytest.fixture
def quick_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own generator in place of ours, for tests with thousands of draws: much faster on vectors this short."""

    def normal(key: int, ranges: noise.ElementRanges, device: torch.device | str) -> Tensor:
        return torch.randn(ranges.total, generator=torch.Generator().manual_seed(key & (2**63 - 1)))

    def uniform_int32(key: int, ranges: noise.ElementRanges, device: torch.device | str) -> Tensor:
        generator = torch.Generator().manual_seed(key & (2**63 - 1))
        return torch.randint(-(2**31), 2**31, (ranges.total,), generator=generator).int()

    monkeypatch.setattr(noise, "normal", normal)
    monkeypatch.setattr(noise, "uniform_int32", uniform_int32)


def random_weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(m.out_features, m.in_features) for m in MODULES]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def quadratic(optimum: Weights) -> Loss:
    """Half the squared distance to the optimum, times a different factor (mean 1) for each example."""
    factors_E = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)

    def loss(weights: Weights) -> Tensor:
        return factors_E * sum(0.5 * (w - o).square().sum() for w, o in zip(weights, optimum, strict=True))

    return loss


def curved(optimum: Weights) -> Loss:
    """Not quadratic, so that a central difference is not the derivative and eps matters."""

    def loss(weights: Weights) -> Tensor:
        distance = torch.cat([(w - o).flatten() for w, o in zip(weights, optimum, strict=True)])
        return torch.stack([distance.mul(k).cosh().log().sum() for k in (0.7, 1.0, 1.6)])

    return loss


class Toy:
    """A run on MODULES with the package's own state: what the worker does, on dense float64 weights."""

    def __init__(self, method: Method, space: str, num_bases: int = 1, job_seed: int = JOB_SEED) -> None:
        self.method, self.space, self.num_bases = method, space, num_bases
        self.state = AdapterState(method, method.layout(MODULES), job_seed, num_bases)
        self.base = [torch.zeros(m.out_features, m.in_features) for m in MODULES]
        self.basis = 0
        self.log: list[tuple[ProbePlan, list[float]]] = []

    def weights(self, offset_N: Tensor | None = None) -> Weights:
        total = [w.double() for w in self.base]
        for basis in [self.basis] if self.space == "fold" else range(self.num_bases):
            theta_N = self.state.accumulator(basis).double()
            if offset_N is not None and basis == self.basis:
                theta_N = theta_N + offset_N
            pairs = zip(total, *self.state.factors(basis, theta_N), strict=True)
            total = [w + change_of(u, v) for w, u, v in pairs]
        return total

    def move_to(self, basis: int) -> None:
        if self.space == "fold" and basis != self.basis:
            pairs = zip(self.base, *self.state.factors(self.basis, self.state.acc_BN[0]), strict=True)
            self.base = [fold_into(w, u, v, 0, "") for w, u, v in pairs]
            self.state.acc_BN.zero_()
        self.basis = basis

    def losses(self, plan: ProbePlan, loss: Loss) -> Tensor:
        offsets = [self.state.offset(plan, i) if p.sign else None for i, p in enumerate(plan.probes)]
        return torch.stack([loss(self.weights(offset)) for offset in offsets])

    def step(self, step: int, loss: Loss, learning_rate: float) -> None:
        self.move_to(basis_of(self.method, step, self.space, self.num_bases))
        plan = self.method.plan(self.state.job_seed, step, self.basis)
        coefficients_K = self.method.coefficients(plan, self.losses(plan, loss)).float()
        self.state.apply(plan, coefficients_K, learning_rate)
        self.log.append((plan, coefficients_K.tolist()))

    def run(self, steps: int, loss: Loss, learning_rate: float) -> Toy:
        for step in range(steps):
            self.step(step, loss, learning_rate)
        return self


# --- every method -----------------------------------------------------------------------------------------------------


def test_every_method_of_the_package_has_a_row_in_the_table() -> None:
    assert set(METHODS) <= {case.name for case in CASES.values()}


def test_a_method_answers_the_protocol_and_survives_pickling_and_json(method: Method) -> None:
    assert isinstance(method, Method)
    assert pickle.loads(pickle.dumps(method)) == method
    assert type(method)(**json.loads(json.dumps(settings(method)))) == method
    assert method.update_spaces and set(method.update_spaces) <= {"bank", "fold"}


@pytest.mark.usefixtures("quick_noise")
def test_it_descends_a_quadratic_in_every_space_it_runs_in(method: Method, case: Case) -> None:
    """Bound: to a fifth of what is within reach. In a bank that is the span of its bases: one of rank r reaches r of a
    module's I input dimensions."""
    optimum = random_weights(1)
    loss = quadratic(optimum)
    for space, num_bases in [("bank", 1), ("bank", 3), ("fold", 1)]:
        if space not in method.update_spaces or (num_bases > 1 and method.epoch(10**9) == 0):
            continue
        toy = Toy(method, space, num_bases)
        start = loss(toy.weights()).mean()
        toy.run(case.steps, loss, case.learning_rate)
        floor = torch.zeros(()) if space == "fold" else unreachable(toy, optimum)
        assert loss(toy.weights()).mean() - floor < case.reach * (start - floor), (space, num_bases)


def unreachable(toy: Toy, optimum: Weights) -> Tensor:
    """Least value of the mean quadratic loss over what the trained numbers of all bases span (at the start, where they
    are not linear in the weights: two factors reach further)."""
    if isinstance(toy.method, MeZOLoRA):
        return torch.zeros(())
    columns = []
    for basis in range(toy.num_bases):
        for unit in torch.eye(toy.state.acc_BN.shape[1], dtype=torch.float64):
            pairs = zip(*toy.state.factors(basis, unit), strict=True)
            changes = [change_of(u, v) for u, v in pairs]
            columns.append(torch.cat([change.flatten() for change in changes]))
    target = torch.cat([w.flatten() for w in optimum])
    q, s, _ = torch.linalg.svd(torch.stack(columns, dim=1), full_matrices=False)
    q = q[:, s > 1e-6]
    return 0.5 * (target - q @ (q.T @ target)).square().sum()


@pytest.mark.usefixtures("quick_noise")
def test_the_estimate_is_unbiased_up_to_its_gain(method: Method, case: Case) -> None:
    """On a linear loss, E[sum_k w_k Z_k] = gain * G over directions and bases: r * G for LoZO, G for directions of
    variance 1.

    Bound: 5 standard errors of the sample mean in each of the 38 entries (chance of a false alarm 2e-5), and these are
    small enough (under 0.15 of the expected norm) to notice a wrong factor such as a missing 1/K or 1/2.
    """
    if case.gain is None:
        pytest.skip("normalised, or not plain descent: compared with its dense version instead")
    gradient = random_weights(2)

    def linear(weights: Weights) -> Tensor:
        return sum((w * g).sum() for w, g in zip(weights, gradient, strict=True)) * torch.ones(EXAMPLES)

    samples = []
    for seed in range(400):
        toy = Toy(method, method.update_spaces[0], job_seed=seed)
        toy.step(0, linear, learning_rate=1.0)
        samples.append(-torch.cat([w.flatten() for w in toy.weights()]))
    estimate = torch.stack(samples)
    expected = case.gain * torch.cat([g.flatten() for g in gradient])
    error = estimate.std(dim=0) / math.sqrt(len(estimate))
    assert ((estimate.mean(dim=0) - expected).abs() < 5 * error).all()
    assert error.mean() < 0.15 * expected.norm()


def test_a_replay_from_seeds_and_coefficients_gives_the_same_bits(method: Method) -> None:
    for space in method.update_spaces:
        run = Toy(method, space, num_bases=2 if space == "bank" and method.epoch(9) else 1).run(
            16, quadratic(random_weights(3)), 0.01
        )
        replay = Toy(method, space, run.num_bases)
        for plan, coefficients in json.loads(json.dumps([(asdict(plan), c) for plan, c in run.log])):
            again = method.plan(JOB_SEED, plan["step"], plan["basis"])
            assert [asdict(probe) for probe in again.probes] == plan["probes"]
            replay.move_to(again.basis)
            replay.state.apply(again, torch.tensor(coefficients), 0.01)
        ours, theirs = replay.state.tensors(), run.state.tensors()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(torch.equal(a, b) for a, b in zip(replay.base, run.base, strict=True))


def test_coefficients_are_float32_one_a_direction(method: Method) -> None:
    plan = method.plan(JOB_SEED, 0, 0)
    losses_PE = torch.rand(len(plan.probes), EXAMPLES, generator=torch.Generator().manual_seed(0))
    coefficients_K = method.coefficients(plan, losses_PE)
    assert coefficients_K.dtype == torch.float32 and coefficients_K.shape == (len(plan.keys),)


def test_a_step_whose_loss_is_not_finite_changes_nothing(method: Method) -> None:
    """Not the weights and not what the optimizer remembers; a refresh of the basis may fall on it."""
    toy = Toy(method, method.update_spaces[0]).run(5, quadratic(random_weights(3)), 0.01)
    before = {name: tensor.clone() for name, tensor in toy.state.tensors().items()}
    plan = method.plan(JOB_SEED, 5, toy.basis)
    toy.state.apply(plan, torch.zeros(len(plan.keys)), 0.01, finite=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in toy.state.tensors().items())


def test_a_learning_rate_of_zero_changes_nothing(method: Method) -> None:
    for space in method.update_spaces:
        toy = Toy(method, space).run(12, quadratic(random_weights(3)), 0.0)
        assert all((w == 0).all() for w in toy.weights())


def test_every_direction_of_a_run_is_different(method: Method) -> None:
    seeds = [seed for step in range(40) for seed in method.plan(JOB_SEED, step, 0).keys]
    seeds += method.plan(JOB_SEED + 1, 0, 0).keys
    assert len(set(seeds)) == len(seeds)


# --- against naive dense versions -------------------------------------------------------------------------------------


def draw(key: int, rows_of: Callable[[ModuleShape], int], rank: int) -> Weights:
    sizes = [noise.ElementRanges.of([(m.name, 0, rows_of(m) * rank)]) for m in MODULES]
    return [noise.normal(key, size, "cpu").double().view(-1, rank) for size in sizes]


def dense_zo_sgd(
    loss: Loss, steps: int, lr: float, *, rank: int, interval: int, scale: float, eps: float, queries: int, cycle: int
) -> tuple[Weights, list[list[float]]]:
    """Zeroth-order SGD with dense float64 weights, as the papers print it. V number `(step // interval) % cycle`."""
    weights: Weights = [torch.zeros(m.out_features, m.in_features, dtype=torch.float64) for m in MODULES]
    log = []
    for step in range(steps):
        basis = (step // interval) % cycle
        vs = draw(noise.derive_key(JOB_SEED, "V", basis), lambda m: m.in_features, rank)
        estimate, grads = [torch.zeros_like(w) for w in weights], []
        for k in range(queries):
            us = draw(noise.derive_key(JOB_SEED, "U", step, k), lambda m: m.out_features, rank)
            z = [scale * u @ v.T for u, v in zip(us, vs, strict=True)]
            plus = loss([w + eps * d for w, d in zip(weights, z, strict=True)]).mean()
            minus = loss([w - eps * d for w, d in zip(weights, z, strict=True)]).mean()
            grads.append(float((plus - minus) / (2 * eps)) / queries)
            estimate = [e + grads[-1] * d for e, d in zip(estimate, z, strict=True)]
        weights = [w - lr * e for w, e in zip(weights, estimate, strict=True)]
        log.append(grads)
    return weights, log


def assert_same_run(toy: Toy, dense: tuple[Weights, list[list[float]]]) -> None:
    """Tolerance: the accumulator, the coefficients and a folded weight are float32 (6e-8 of the largest, which is near
    1), and a run of 40 steps adds up fewer than 100 roundings, most of which cancel."""
    weights, log = dense
    torch.testing.assert_close(torch.tensor([c for _, c in toy.log]), torch.tensor(log), rtol=1e-5, atol=2e-6)
    for ours, theirs in zip(toy.weights(), weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("space", ["bank", "fold"])
def test_lozo_equals_dense_lozo_over_several_intervals(space: str, queries: int) -> None:
    """Six intervals; the bank has four bases, so two of them return to their accumulators."""
    method = LoZO(rank=2, interval=7, eps=0.05, queries=queries)
    loss, steps, lr = curved(random_weights(4)), 40, 0.004
    toy = Toy(method, space, num_bases=4 if space == "bank" else 1).run(steps, loss, lr)
    cycle = 4 if space == "bank" else steps
    dense = dense_zo_sgd(loss, steps, lr, rank=2, interval=7, scale=1.0, eps=0.05, queries=queries, cycle=cycle)
    assert_same_run(toy, dense)


@pytest.mark.parametrize("queries", [1, 3])
def test_factorized_mezo_equals_its_dense_version(queries: int) -> None:
    method = FactorizedMeZO(rank=6, eps=0.05, queries=queries)
    loss, steps, lr = curved(random_weights(5)), 30, 0.01
    toy = Toy(method, "fold").run(steps, loss, lr)
    scale = 6**-0.5
    dense = dense_zo_sgd(loss, steps, lr, rank=6, interval=1, scale=scale, eps=0.05, queries=queries, cycle=steps)
    assert_same_run(toy, dense)


def test_a_bank_equals_fold_until_a_basis_returns_and_not_after() -> None:
    method, loss = LoZO(rank=2, interval=5), curved(random_weights(6))
    bank, fold = Toy(method, "bank", num_bases=3), Toy(method, "fold")
    for step in range(20):
        bank.step(step, loss, 0.01)
        fold.step(step, loss, 0.01)
        gap = max(float((a - b).abs().max()) for a, b in zip(bank.weights(), fold.weights(), strict=True))
        assert gap < 1e-5 if step < 15 else gap > 1e-3, f"step {step}: {gap}"


@pytest.mark.usefixtures("quick_noise")
@pytest.mark.parametrize("rank", [1, 16, 128])
def test_directions_of_factorized_mezo_have_unit_variance_at_any_rank(rank: int) -> None:
    """Bound: with 1,000 rows and columns the sample variance has a standard error of 0.063 / sqrt(rank); 5 of them."""
    method = FactorizedMeZO(rank=rank)
    state = AdapterState(method, FactorLayout((ModuleShape("layers.0.fc1", 1000, 1000),), rank), JOB_SEED, 1)
    u_N, v_N = state.draws(method.plan(JOB_SEED, 0, 0).keys)[0], state.frozen(0)
    direction = method.coordinates.scale * u_N.view(-1, rank) @ v_N.view(-1, rank).T
    assert abs(float(direction.var()) - 1.0) < 5 * 0.063 / rank**0.5


# --- hyperparameters, registry, schedules -----------------------------------------------------------------------------


def test_probes_of_one_direction_lie_side_by_side() -> None:
    plan = LoZO(queries=3).plan(JOB_SEED, 9, 2)
    assert [p.sign for p in plan.probes] == [1, -1] * 3
    assert [p.key for p in plan.probes[::2]] == [p.key for p in plan.probes[1::2]] == list(plan.keys)
    assert plan.keys == tuple(noise.derive_key(JOB_SEED, "U", 9, k) for k in range(3))
    assert (plan.step, plan.basis) == (9, 2)


def test_v_is_kept_for_the_interval() -> None:
    assert [LoZO(interval=3).epoch(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert [FactorizedMeZO().epoch(step) for step in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("lozzo", {}, r"unknown method 'lozzo': did you mean 'lozo'\? Known: eggroll, factorized-mezo"),
        ("lozo", {"intervall": 3}, r"unknown setting of method lozo 'intervall': did you mean 'interval'"),
        ("factorized-mezo", {"interval": 3}, r"unknown setting of method factorized-mezo 'interval'.*queries"),
        ("lozo", {"eps": 0.0}, r"lozo\.eps=0\.0: expected a number > 0; LoZO and MeZO use 1e-3"),
        ("lozo", {"eps": float("nan")}, r"lozo\.eps=nan: expected a number > 0"),
        ("lozo", {"eps": "small"}, r"lozo\.eps='small': expected a number > 0"),
        ("lozo", {"interval": 0}, r"lozo\.interval=0: expected an integer >= 1"),
        ("lozo", {"rank": 2.0}, r"lozo\.rank=2\.0: expected an integer from 1 to 512"),
        ("lozo", {"rank": True}, r"lozo\.rank=True: expected an integer"),
        ("factorized-mezo", {"rank": 513}, r"factorized-mezo\.rank=513: expected an integer from 1 to 512"),
        ("lozo", {"queries": 0}, r"lozo\.queries=0: expected an integer >= 1"),
    ],
)
def test_a_bad_hyperparameter_is_named_with_value_and_fix(
    name: str, hyperparameters: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        METHODS.build(name, **hyperparameters)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("constant", 4, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]),
        ("linear", 2, [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]),
        ("cosine", 2, [1.0, 2.0, 2.0, 1.0 + 0.5**0.5, 1.0, 1.0 - 0.5**0.5]),
    ],
)
def test_learning_rate_schedules(schedule: LRSchedule, warmup: int, expected: Sequence[float]) -> None:
    rates = [learning_rate_at(schedule, 2.0, step, 6, warmup) for step in range(6)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_schedules_decay_to_zero_at_the_end_and_stay_there() -> None:
    for schedule in ("linear", "cosine"):
        assert learning_rate_at(schedule, 2.0, 6, 6) == learning_rate_at(schedule, 2.0, 9, 6) == 0.0  # type: ignore[arg-type]
    assert learning_rate_at("linear", 2.0, 5, 6, warmup=6) == 2.0
