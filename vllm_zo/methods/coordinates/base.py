"""What is trained of a linear weight: a few numbers a module, and how they become the factors of an adapter.

    delta W = U(theta, basis) V(theta, basis)^T        theta: the trained numbers, zero at the start of a job
                                                       basis: what a refresh draws anew from a key, frozen in between

A direction is a vector of the same numbers. Where U V^T is linear in theta (all but `TwoFactors`), state and
perturbation lie in separate rank blocks of a slot; their sum never rounds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.methods.probe import ModuleShape, ProbePlan

if TYPE_CHECKING:
    from vllm_zo.methods.state import AdapterState


@dataclass(frozen=True)
class Block:
    """One rank block of a slot. Equal tags, equal content; the tensors are made only where a tag is stale.

    Attributes:
        index: which block of R rows.
        u, v: make the flat (N_U,) and (N_V,) factors; `u` None stands for zeros.
    """

    index: int
    u_tag: object
    v_tag: object
    u: Callable[[], Tensor] | None
    v: Callable[[], Tensor]


@dataclass(frozen=True)
class Coordinates(ABC):
    """The trained numbers of every module. Implementations are frozen dataclasses without state.

    Tensors are float32 on the state's device, flat over all modules in the layout's order.
    """

    refreshed: ClassVar[str]
    """What a refresh draws anew, for people: "V"."""
    has_matrices: ClassVar[bool] = True
    """Whether a module's numbers form matrices (see `matrices`)."""
    in_place: ClassVar[bool] = False
    """Whether a probe is written into the base weights and not into a slot: one at a time, in `fold` space only."""

    rank: int
    """Columns of U and V."""
    scale: float = 1.0
    """Factor of a direction: it is `scale` times what `draw` gives."""
    folds_every_step: bool = False
    """Whether the basis is another at every step, and the accumulator folded before it: no probe meets one, so that
    a slot holds either a perturbation or, for an evaluation, the accumulator."""

    @property
    def draws_normals(self) -> bool:
        """Whether a direction is `noise.normal` of `ranges` as it is, so that an update may draw it anew."""
        return type(self).draw is Coordinates.draw and type(self).embed is Coordinates.embed

    def check_module(self, module: ModuleShape) -> None:  # noqa: B027 - most have no condition
        """Raise ConfigError for a module whose factors cannot be made."""

    @abstractmethod
    def ranges(self, layout: FactorLayout) -> noise.ElementRanges:
        """The trained numbers, a piece a module."""

    def draw(self, key: int, layout: FactorLayout, device: torch.device) -> Tensor:
        """The numbers behind one direction, (N,) unless `embed` says otherwise: independent standard normals."""
        return noise.normal(key, self.ranges(layout), device)

    def embed(self, draw: Tensor, index: int, layout: FactorLayout) -> Tensor:
        """(N,) direction number `index` of a step, from its draw."""
        return draw

    @abstractmethod
    def basis(self, key: int, layout: FactorLayout, device: torch.device) -> Any:
        """What is frozen between refreshes; handed back to the methods below."""

    @abstractmethod
    def factors(self, theta_N: Tensor, basis: Any, layout: FactorLayout) -> tuple[Tensor, Tensor]:
        """Flat (N_U,) and (N_V,) with `U V^T` the change of the weight."""

    def module_factors(
        self, theta_N: Tensor, basis: Any, layout: FactorLayout
    ) -> tuple[list[Tensor], Sequence[Tensor | None]]:
        """Per module U (O, R) and V (I, R); V None says that U is the whole change (O, I)."""
        u_N, v_N = self.factors(theta_N, basis, layout)
        return layout.split_u(u_N), layout.split_v(v_N)

    def transfer(self, vector_N: Tensor, old: Any, new: Any, layout: FactorLayout) -> Tensor:
        """An optimizer's vector (a momentum) said in the coordinates of another basis."""
        raise NotImplementedError(f"{type(self).__name__} is never refreshed")

    def matrices(self, theta_N: Tensor, layout: FactorLayout) -> list[Tensor]:
        """Views of theta as one or more matrices a module, in its order."""
        raise NotImplementedError(f"{type(self).__name__} trains a vector a module")

    def num_blocks(self, num_bases: int) -> int:
        """Rank blocks of a slot."""
        return 1 if self.folds_every_step else num_bases + 1

    def blocks(self, state: AdapterState, plan: ProbePlan, probe: int) -> list[Block]:
        """What a slot holds for one probe: block 0 the perturbation, block 1 + b the accumulator of basis b."""
        p = plan.probes[probe]

        def perturbation() -> Tensor:
            return self.factors(state.offset(plan, probe), state.basis(plan.basis), state.layout)[0]

        def basis_v(basis: int) -> Callable[[], Tensor]:
            return lambda: self.factors(state.acc_BN[state.row(basis)], state.basis(basis), state.layout)[1]

        def accumulator(row: int, basis: int) -> Callable[[], Tensor]:
            return lambda: self.factors(state.acc_BN[row], state.basis(basis), state.layout)[0]

        if p.sign:
            first = Block(0, (plan.step, plan.round, p), plan.basis, perturbation, basis_v(plan.basis))
        else:
            first = Block(0, "zero", plan.basis, None, basis_v(plan.basis))
        rest = [
            Block(1 + row, (basis, state.versions[row]), basis, accumulator(row, basis), basis_v(basis))
            for row, basis in state.touched_bases()
        ]
        if self.folds_every_step and rest:
            assert not p.sign, "a probe of a step before the fold of the one before"
            (accumulated,) = rest
            return [replace(accumulated, index=0)]
        return [first, *rest]
