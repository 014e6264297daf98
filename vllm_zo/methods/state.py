"""The trained quantity of a job: per basis a fp32 vector of trained numbers, and what the optimizer remembers.

The worker, `replay` and the reference trainer in the tests share this file, so a logged run rebuilds bit for bit.
All modules' numbers lie in one flat float32 vector (N,): noise, update and logging touch it in single operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.base import Method, ProbePlan
from vllm_zo.methods.coordinates import Block
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.methods.optimizers import Estimate, State

__all__ = ["AdapterState", "FactorLayout"]

BASIS_STREAM = "V"


class AdapterState:
    """Trained numbers, factors and optimizer state of one job.

    The delta to the base weights of a module is `sum_b U_b V_b^T` over the bases held here, with the factors of a basis
    those of `method.coordinates` at its accumulator.

    Args:
        num_bases: bases kept at once (1 in `fold` space, M in `bank` space).
    """

    def __init__(
        self, method: Method, layout: FactorLayout, job_seed: int, num_bases: int, device: torch.device | str = "cpu"
    ) -> None:
        self.method = method
        self.coordinates = method.coordinates
        self.layout = layout
        self.job_seed = job_seed
        self.num_bases = num_bases
        self.device = torch.device(device)
        numbers = self.coordinates.ranges(layout).total
        self.acc_BN = torch.zeros(num_bases, numbers, dtype=torch.float32, device=device)
        self.optimizer_state: State = method.optimizer.init(self.acc_BN[0])
        self.versions = [0] * num_bases
        """Updates each accumulator has seen; with its basis, a name for its content."""
        self.basis_of_row: dict[int, int] = {}
        """Accumulators in use and the basis each belongs to."""
        self.optimizer_basis: int | None = None
        """The basis in whose coordinates the optimizer's vectors are said: that of the last step."""
        self._draws: tuple[tuple[int, ...], Tensor] | None = None
        self._basis: tuple[int, Any] | None = None
        self._proposal: Tensor | None = None

    # --- what is where ----------------------------------------------------------------------------------------------

    def factory(self) -> Callable[[], AdapterState]:
        """Makes empty states of the same job, without keeping this one alive."""
        return partial(AdapterState, self.method, self.layout, self.job_seed, self.num_bases, self.device)

    def row(self, basis: int) -> int:
        """Which accumulator belongs to a basis."""
        return basis % self.num_bases

    def touched_bases(self) -> list[tuple[int, int]]:
        """(row, basis) of every accumulator that has been updated, by row."""
        return sorted(self.basis_of_row.items())

    def mark_touched(self, bases: Iterable[int]) -> None:
        """Say which bases the accumulators hold, after they were loaded from a snapshot."""
        self.basis_of_row = {self.row(basis): basis for basis in bases}

    def tensors(self) -> dict[str, Tensor]:
        """Everything a snapshot must hold, by name."""
        return {"acc_BN": self.acc_BN} | {f"optimizer.{name}": t for name, t in self.optimizer_state.items()}

    # --- factors ----------------------------------------------------------------------------------------------------

    def basis(self, basis: int) -> Any:
        """What the coordinates freeze at a basis, from its key alone. The last one is kept."""
        if self._basis is None or self._basis[0] != basis:
            key = noise.derive_key(self.job_seed, BASIS_STREAM, basis)
            self._basis = basis, self.coordinates.basis(key, self.layout, self.device)
        return self._basis[1]

    def factors(self, basis: int, theta_N: Tensor) -> tuple[list[Tensor], Sequence[Any]]:
        """Per module U (O, R) and V (I, R) of trained numbers in a basis (V None: see `Coordinates.module_factors`)."""
        return self.coordinates.module_factors(theta_N, self.basis(basis), self.layout)

    def bases_to_write(self) -> list[tuple[int, Tensor]]:
        """(basis, trained numbers) of what makes up the adapter; basis 0 when nothing has been trained."""
        return [(basis, self.acc_BN[row]) for row, basis in self.touched_bases()] or [(0, self.acc_BN[0])]

    def v_flat(self, basis: int) -> Tensor:
        """(N_V,) float32: V of a basis before anything is trained."""
        return self.coordinates.factors(torch.zeros_like(self.acc_BN[0]), self.basis(basis), self.layout)[1]

    def u_flat(self, seeds: Sequence[int]) -> Tensor:
        """(K, M) float32: what was drawn for each direction. Kept until other seeds are asked for: the update that
        follows a probe uses the very tensor that was probed, and evicting it is free."""
        wanted = tuple(seeds)
        if self._draws is None or self._draws[0] != wanted:
            drawn = [self.coordinates.draw(seed, self.layout, self.device) for seed in wanted]
            self._draws = wanted, torch.stack(drawn)
        return self._draws[1]

    @property
    def regenerates(self) -> bool:
        """Whether an update draws its directions anew. On a GPU one launch adds them all without storing one, so that
        of K directions only the one whose slots are written is held. The same generator gives the same directions."""
        return self.device.type == "cuda" and self.coordinates.draws_normals

    def offset(self, plan: ProbePlan, probe: int) -> Tensor:
        """(N,): what a probe adds to the trained numbers. Not for the centre, which adds nothing."""
        p = plan.probes[probe]
        if p.at_step:
            assert self._proposal is not None, "a probe at the step before there was a first round"
            return self._proposal * (p.sign * p.eps)
        index = plan.seeds.index(p.seed)
        drawn = self.u_flat([p.seed])[0] if self.regenerates else self.u_flat(plan.seeds)[index]
        direction = self.coordinates.embed(drawn, index, self.layout)
        return direction * (p.sign * p.eps * self.coordinates.scale)

    def blocks(self, plan: ProbePlan, probe: int) -> list[Block]:
        """What a slot holds for one probe."""
        return self.coordinates.blocks(self, plan, probe)

    # --- the step ---------------------------------------------------------------------------------------------------

    def propose(self, plan: ProbePlan, coefficients_K: Tensor, learning_rate: float) -> None:
        """Keep the step that `apply` would take with these coefficients, for probes at the step."""
        theta_N = self.acc_BN[self.row(plan.basis)]
        self._move_optimizer_to(plan.basis)
        moved_N, _ = self._update(plan, theta_N, coefficients_K, learning_rate)
        self._proposal = moved_N - theta_N

    def apply(
        self, plan: ProbePlan, coefficients_K: Tensor, learning_rate: float, finite: bool | Tensor = True
    ) -> None:
        """Take the step: the optimizer moves the accumulator of the plan's basis.

        Args:
            plan: of the first round, whose directions the coefficients belong to.
            finite: False (or a bool tensor that says so on the device): a loss was not finite, and nothing changes.
                The coefficients are zeros then.
        """
        row, optimizer = self.row(plan.basis), self.method.optimizer
        self._move_optimizer_to(plan.basis)
        state = self.optimizer_state
        theta_N, updated = self._update(plan, self.acc_BN[row], coefficients_K, learning_rate)
        if state or optimizer.weight_decay:
            keep = torch.as_tensor(finite, device=self.device)
            theta_N = torch.where(keep, theta_N, self.acc_BN[row])
            updated = {name: torch.where(keep, tensor, state[name]) for name, tensor in updated.items()}
            if optimizer.weight_decay:
                self._decay(learning_rate * optimizer.weight_decay, keep, row)
        self.acc_BN[row] = theta_N
        self.optimizer_state = updated
        self.basis_of_row[row] = plan.basis
        self.versions[row] += 1

    def _update(
        self, plan: ProbePlan, theta_N: Tensor, coefficients_K: Tensor, learning_rate: float
    ) -> tuple[Tensor, State]:
        optimizer = self.method.optimizer
        seeds, draws = plan.seeds, partial(self.u_flat, plan.seeds)
        estimate = Estimate(
            self.coordinates, self.layout, seeds, draws, coefficients_K.to(self.device), self.regenerates
        )
        if optimizer.weight_decay:
            theta_N = theta_N * (1.0 - learning_rate * optimizer.weight_decay)
        return optimizer.update(theta_N, estimate, self.optimizer_state, learning_rate)

    def _move_optimizer_to(self, basis: int) -> None:
        """Say the optimizer's state in the coordinates of `basis`."""
        old, self.optimizer_basis = self.optimizer_basis, basis
        if not self.optimizer_state or old is None or old == basis:
            return
        frozen_old, frozen_new = self.basis(old), self.basis(basis)
        self.optimizer_state = self.method.optimizer.refresh(
            self.optimizer_state,
            lambda vector_N: self.coordinates.transfer(vector_N, frozen_old, frozen_new, self.layout),
        )

    def _decay(self, rate: float, keep: Tensor, moved_row: int) -> None:
        """The other bases shrink with the one that moves: together they are the adapter."""
        factor = torch.where(keep, 1.0 - rate, 1.0)
        for row in range(self.num_bases):
            if row != moved_row:
                self.acc_BN[row] *= factor
                self.versions[row] += 1

    def take(self) -> tuple[int, Tensor] | None:
        """The single accumulator and its basis, to be folded; the state is zero afterwards. None if nothing was
        added."""
        assert self.num_bases == 1, "only a fold-space state gives its accumulator away"
        if not self.basis_of_row:
            return None
        basis, acc = self.basis_of_row.pop(0), self.acc_BN[0].clone()
        self.acc_BN.zero_()
        return basis, acc
