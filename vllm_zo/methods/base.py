"""What a zeroth-order method is, in pure torch. No file of this folder knows vLLM, its requests or its buffers.

    coordinates    say which numbers of each weight train, how they become two factors, and how to draw a direction
    estimator      says which states to score around the current one, and makes a gradient estimate of their losses
    optimizer      makes a step of the estimate, and keeps what it must remember

A method combines the three with its hyperparameters. The engine and the worker take one step like this:

    plan = method.plan(job_seed, step, basis)           scheduler: the probes, from seeds alone
    losses_PE                                           engine: every probe scored on the same mini-batch
    w_K = method.coefficients(plan, losses_PE)          worker, on the device
    theta, state = optimizer.update(theta, ..., w_K)    worker, and a replay of the logged w_K
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar

from torch import Tensor

from vllm_zo import noise
from vllm_zo.errors import ConfigError
from vllm_zo.methods.coordinates import Coordinates, LeftFactor
from vllm_zo.methods.estimators import ESTIMATORS, Estimator, TwoSided
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.methods.optimizers import OPTIMIZERS, SGD, Optimizer
from vllm_zo.methods.plan import ModuleShape, ProbePlan
from vllm_zo.options import check_options, option
from vllm_zo.registry import settings

DIRECTION_STREAM = "U"
"""Part of every direction's key, so that no direction shares its key with a V (`state.BASIS_STREAM`)."""
MAX_RANK = 512
"""The widest adapter that vLLM 0.32 serves (`MaxLoRARanks` in vllm/config/lora.py)."""


def rank_option(default: Any = MISSING) -> Any:
    """The option `rank` of a method."""
    fix = "vLLM serves no wider adapter"
    return option(default, minimum=1, maximum=MAX_RANK, fix=fix, panel="Method", help="Rank of a direction.")


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method is frozen and picklable and has no state; its fields describe it and can be written as JSON.

    A subclass gives `name`, its hyperparameters with defaults, and `coordinates`. The other members have defaults,
    which ask the estimator or the optimizer. A user may give both by name ("adam") or as {"name": ..., settings}.
    """

    name: ClassVar[str]
    update_spaces: ClassVar[tuple[str, ...]] = ("bank", "fold")
    """The update spaces in which the method can run. The first is the default."""
    refusals: ClassVar[Mapping[str, str]] = {}
    """Space -> why the method cannot run in it."""
    auto_share: ClassVar[float] = 1.0
    """A factor of the step size that `learning_rate="auto"` finds (methods/step_size.py)."""

    eps: float = option(
        1e-3, above=0, fix="LoZO and MeZO use 1e-3", panel="Method", help="Probe radius in weight units."
    )
    queries: int = option(
        1,
        minimum=1,
        fix="1 direction a step is what the papers use",
        panel="Method",
        help="Directions that a step averages.",
    )
    """K in the formulas. One perturbation group scores the probes of all of them."""
    estimator: Estimator = option(
        factory=TwoSided, panel="Method", metavar="PART", help="How losses become an estimate of the gradient"
    )
    optimizer: Optimizer = option(factory=SGD, panel="Method", metavar="PART", help="How the estimate becomes a step")

    def __post_init__(self) -> None:
        # The parts first, because `validate` asks them. The dataclass is frozen: a plain assignment would raise.
        object.__setattr__(self, "estimator", ESTIMATORS.build(self.estimator))
        object.__setattr__(self, "optimizer", OPTIMIZERS.build(self.optimizer))
        check_options(self, f"{self.name}.")
        self.validate()

    def __str__(self) -> str:
        """ "LoZO(rank=2, interval=50, eps=0.001, queries=1)": the subclass's own fields come first, and a part appears
        only where it is not the default."""
        given = settings(self)
        own = [name for name in given if name not in Method.__dataclass_fields__]
        names = own + [name for name in given if name not in own]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def validate(self) -> None:
        """Check that the hyperparameters go together. (The option of each one checks its range.)

        Raises:
            ConfigError: the estimator needs more queries, or the optimizer needs matrices that the method has not.
        """
        self.estimator.check_queries(self.name, self.queries)
        if self.optimizer.needs_matrices and not self.coordinates.has_matrices:
            raise ConfigError(
                f"optimizer={self.optimizer.name!r} makes a step from matrices, and {self.name} trains a vector a "
                "module; choose another optimizer."
            )

    def check_space(self, space: str) -> None:
        """Check that the method can run in an update space.

        Raises:
            ConfigError: it cannot. The message gives the reason.
        """
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
        """Which numbers of each weight the method trains."""

    def epoch(self, step: int) -> int:
        """How often the method has refreshed V when it takes `step`. It is 0 at every step if V never changes."""
        return 0

    def plan(self, job_seed: int, step: int, basis: int) -> ProbePlan:
        """The probes of a step. The key of direction k is a function of (job_seed, step, k) alone."""
        keys = [noise.derive_key(job_seed, DIRECTION_STREAM, step, k) for k in range(self.queries)]
        return ProbePlan(step=step, probes=self.estimator.probes(keys, self.eps), basis=basis)

    def coefficients(self, plan: ProbePlan, losses_PE: Tensor) -> Tensor:
        """(P, E) float32 losses in nats -> (K,) float32 weights of the directions in the gradient estimate."""
        # A method may override this to change the weights; the seed log then holds the changed ones.
        return self.estimator.coefficients(plan, losses_PE)

    @property
    def auto_step(self) -> float:
        """The length of a step with `learning_rate="auto"`, in units of `eps` times a direction."""
        share = self.auto_share * self.optimizer.auto_share
        # The mean of K directions has less noise and allows a longer step (step_size.py). The step of a scale-free
        # optimizer has its length from the optimizer, whatever K is.
        return share if self.optimizer.scale_free else share * math.sqrt(self.queries)

    def layout(self, modules: tuple[ModuleShape, ...]) -> FactorLayout:
        """Where the factors of `modules` lie in the flat vectors.

        Raises:
            ConfigError: the rank exceeds the number of orthonormal columns that a module has room for.
        """
        coordinates = self.coordinates
        for module in modules:
            coordinates.check_module(module)
        return FactorLayout(modules, coordinates.rank)


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(Method):
    """Methods whose directions are `U V^T`. Each direction has a fresh U; V stays for `interval` steps."""

    rank: int = rank_option(2)
    interval: int = option(
        50, minimum=1, fix="LoZO's paper uses 50 to 500", panel="Method", help="Steps for which V is kept."
    )
    """The LoZO paper calls it nu."""

    @property
    def coordinates(self) -> Coordinates:
        return LeftFactor(self.rank)

    def epoch(self, step: int) -> int:
        return step // self.interval


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(Method):
    """Methods that train the factors of one LoRA adapter for the whole run."""

    update_spaces = ("bank",)

    rank: int = rank_option()
    """Rank of the adapter."""
    alpha: float = option(
        above=0, fix="MeZO uses 16 at rank 8", panel="Method", help="LoRA's alpha, where an adapter is trained."
    )
    """The method multiplies the adapter by alpha / rank."""
