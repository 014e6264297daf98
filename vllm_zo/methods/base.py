"""What a zeroth-order method is. Pure torch: nothing here knows vLLM, slots or requests.

    coordinates    what is trained of each weight, how it becomes an adapter, how a direction is drawn
    estimator      which states are scored around the current one, what their losses say of the gradient
    optimizer      the estimate -> a step, with what it must remember

A method puts the three together with its hyperparameters. One step, as the engine and the worker take it:

    plan = method.plan(job_seed, step, basis)           scheduler: the probes, from seeds alone
    losses_PE                                           engine: every probe scored on the same mini-batch
    w_K = method.coefficients(plan, losses_PE)          worker, on the device
    more = method.next_round(plan)                      scheduler; for most methods None
    w_K = method.settle(w_K, more, losses_PE)           worker: after the losses of a further round
    theta, state = optimizer.update(theta, ..., w_K)    worker, and a replay of the logged w_K
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from vllm_zo import noise
from vllm_zo.errors import ConfigError
from vllm_zo.methods.coordinates import Coordinates, LeftFactor
from vllm_zo.methods.estimators import ESTIMATORS, Estimator, TwoSided
from vllm_zo.methods.estimators.base import projected_grad
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.methods.optimizers import OPTIMIZERS, SGD, Optimizer
from vllm_zo.methods.parts import build_part
from vllm_zo.methods.probe import ModuleShape, Probe, ProbePlan
from vllm_zo.validation import check_float, check_int, reject

__all__ = ["DIRECTION_STREAM", "LowRankMethod", "Method", "ModuleShape", "Probe", "ProbePlan", "projected_grad"]

DIRECTION_STREAM = "U"
MAX_RANK = 512
"""The largest `max_lora_rank` vLLM 0.32 accepts."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Frozen, picklable, without state, described by its JSON-able fields.

    A subclass gives `name`, its hyperparameters with defaults, and `coordinates`; everything else has a default that
    asks the estimator or the optimizer. Both may be given by name ("adam") or as {"name": ..., settings}.
    """

    name: ClassVar[str]
    update_spaces: ClassVar[tuple[str, ...]] = ("bank", "fold")
    """Update spaces the method can run in, default first."""
    refusals: ClassVar[Mapping[str, str]] = {}
    """Why it cannot run in the others."""
    auto_share: ClassVar[float] = 1.0
    """Factor of what `learning_rate="auto"` finds (methods/step_size.py)."""

    eps: float = 1e-3
    """Probe radius in weight units."""
    queries: int = 1
    """Directions per step (K); all are scored in one perturbation group."""
    estimator: Estimator = field(default_factory=TwoSided)
    """How losses become a gradient estimate."""
    optimizer: Optimizer = field(default_factory=SGD)
    """How the estimate becomes a step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "estimator", build_part("estimator", self.estimator, ESTIMATORS))
        object.__setattr__(self, "optimizer", build_part("optimizer", self.optimizer, OPTIMIZERS))
        self.validate()

    def __str__(self) -> str:
        """ "LoZO(rank=2, interval=50, eps=0.001, queries=1)": its own fields first, parts only where chosen."""
        given = method_fields(self)
        own = [name for name in given if name not in Method.__dataclass_fields__]
        names = own + [name for name in given if name not in own]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def validate(self) -> None:
        """Raise ConfigError naming field, value and fix when a hyperparameter is out of range."""
        check_float(f"{self.name}.eps", self.eps, above=0.0, fix="LoZO and MeZO use 1e-3")
        check_int(f"{self.name}.queries", self.queries, 1, fix="1 direction a step is what the papers use")
        self.estimator.validate()
        self.estimator.check_queries(self.name, self.queries)
        self.optimizer.validate()
        if self.optimizer.needs_matrices and not self.coordinates.has_matrices:
            raise ConfigError(
                f"optimizer={self.optimizer.name!r} makes a step from matrices, and {self.name} trains a vector a "
                "module; choose another optimizer."
            )

    def check_space(self, space: str) -> None:
        """Raise ConfigError with the reason where the method cannot run in an update space."""
        if space not in self.update_spaces:
            accepted = " or ".join(repr(s) for s in self.update_spaces)
            why = f" ({self.refusals[space]})" if space in self.refusals else ""
            raise ConfigError(
                f"update_space={space!r}: {self.name} cannot run in it{why}; set update_space={accepted}."
            )
        if space == "fold" and self.optimizer.weight_decay:
            raise ConfigError(
                f"{self.optimizer.name}.weight_decay={self.optimizer.weight_decay}: not defined in "
                "update_space='fold', where W itself would have to shrink at every step; set it to 0, or use 'bank'."
            )

    @property
    @abstractmethod
    def coordinates(self) -> Coordinates:
        """What is trained of each weight."""

    def epoch(self, step: int) -> int:
        """How many times the basis (V) has been refreshed when `step` is taken: 0 at the start, always if never."""
        return 0

    def plan(self, job_seed: int, step: int, basis: int) -> ProbePlan:
        """The probes of a step's first round. Direction k's seed is a function of (job, step, k)."""
        seeds = [noise.derive_key(job_seed, DIRECTION_STREAM, step, k) for k in range(self.queries)]
        return ProbePlan(step=step, probes=self.estimator.probes(seeds, self.eps), basis=basis)

    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        """(P, E) float32 losses in nats -> (K,) float32 weights of the directions in the gradient estimate."""
        return self.estimator.coefficients(plan, losses_PE)

    def next_round(self, plan: ProbePlan) -> ProbePlan | None:
        """Another round of probes on the same mini-batch after that of `plan`, or None: the step ends with it.

        It is known before any loss is: nothing waits for the host. What depends on losses stays on the device, as
        probes `at_step` and as `settle`.
        """
        return self.optimizer.next_round(plan)

    def settle(self, coefficients_K: Tensor, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        """The coefficients after the further round `plan`; what is returned is what is logged and applied."""
        return self.optimizer.settle(coefficients_K, plan, losses_PE)

    @property
    def auto_step(self) -> float:
        """Length of a step with `learning_rate="auto"`, in units of `eps` times a direction."""
        share = self.auto_share * self.optimizer.auto_share
        return share if self.optimizer.scale_free else share * math.sqrt(self.queries)

    def layout(self, modules: tuple[ModuleShape, ...]) -> FactorLayout:
        """Where the factors of `modules` lie in the flat vectors.

        Raises:
            ConfigError: orthonormal factors of this rank do not fit a module.
        """
        coordinates = self.coordinates
        for module in modules:
            coordinates.check_module(module)
        return FactorLayout(modules, coordinates.rank)


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(Method):
    """Directions `U V^T` with U fresh for each direction and V kept for `interval` steps."""

    rank: int = 2
    """Rank of a direction."""
    interval: int = 50
    """Steps for which V is kept (nu in the LoZO paper)."""

    def validate(self) -> None:
        check_int(f"{self.name}.rank", self.rank, 1, MAX_RANK, "vLLM's adapters go no further")
        check_int(f"{self.name}.interval", self.interval, 1, fix="LoZO's paper uses 50 to 500")
        super().validate()

    @property
    def coordinates(self) -> Coordinates:
        return LeftFactor(self.rank)

    def epoch(self, step: int) -> int:
        return step // self.interval


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(Method):
    """Trains the factors of a LoRA adapter themselves, for the whole run."""

    update_spaces = ("bank",)

    rank: int
    """Rank of the adapter."""
    alpha: float
    """LoRA's alpha; the adapter counts alpha / rank times."""

    def validate(self) -> None:
        check_int(f"{self.name}.rank", self.rank, 1, MAX_RANK, "vLLM's adapters go no further")
        check_float(f"{self.name}.alpha", self.alpha, above=0.0, fix="MeZO uses 16 at rank 8")
        super().validate()


def method_fields(method: Method) -> dict[str, Any]:
    """Hyperparameters of a method as JSON has them: `build_method(method.name, **method_fields(method)) == method`.

    An estimator or optimizer that is the method's own default is left out, so that a log names what was chosen.
    """
    described: dict[str, Any] = {}
    for f in fields(method):
        value = getattr(method, f.name)
        if not isinstance(value, Estimator | Optimizer):
            described[f.name] = value
        elif f.default_factory is MISSING or value != f.default_factory():
            described[f.name] = describe_part(value)
    return described


def describe_part(part: Estimator | Optimizer) -> dict[str, Any]:
    """`{"name": ..., settings}`."""
    return {"name": part.name, **{f.name: getattr(part, f.name) for f in fields(part)}}


def check_registered(method: object, known: Mapping[str, type[Any]]) -> None:
    """Refuse a method that the engine, which knows it by name, could not build again."""
    if isinstance(method, Method) and known.get(method.name) is type(method):
        return
    if not isinstance(method, Method):
        reject("method", method, "a method such as LoZO(rank=2)")
    raise ConfigError(
        f"method={method!r}: the engine knows methods by name, and {method.name!r} is not {type(method).__name__}. "
        "Declare it in the entry point group 'vllm_zo.methods' of an installed package (docs/adding-a-method.md)."
    )
