"""What a job trains: a float32 vector of trained numbers for each basis, and the optimizer's state.

The worker, `replay` and the reference trainer of the tests share this file, so that a replay rebuilds a logged run bit
for bit. The numbers of all modules lie in one flat vector (N,), so that noise, update and snapshot are single
operations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_zo import noise
from vllm_zo.methods.base import Method
from vllm_zo.methods.coordinates import Coordinates
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.methods.optimizers import Estimate, State
from vllm_zo.methods.plan import ProbePlan

BASIS_STREAM = "V"
"""Part of the key of every V, so that no V shares its key with a direction (`base.DIRECTION_STREAM`)."""


class AdapterState:
    """The trained numbers, factors and optimizer state of one job. A worker owns one for each job, and steps it.

    The change of a module is `sum_b U_b V_b^T` over the bases with an update. `method.coordinates` makes U_b and V_b of
    the accumulator of b. Accumulator i belongs to a basis b with `b % num_bases == i`.

    Args:
        job_seed: the job's seed, from which the keys of all V follow.
        num_bases: how many bases the state holds at once (1 in `fold` space, M in `bank` space).
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
        self.measured_BN: Tensor | None = None
        """The V of each basis, flat (B, N_V), of coordinates that measure it (methods/leading.py). Zero before."""
        if self.coordinates.measures_v:
            self.measured_BN = torch.zeros(num_bases, layout.v_ranges.total, dtype=torch.float32, device=device)
        self.sizes_N: Tensor | None = None
        """What the numbers of every direction are multiplied by, of coordinates that measure it (methods/written.py).
        Zero before."""
        if self.coordinates.measures_u:
            self.sizes_N = torch.zeros(numbers, dtype=torch.float32, device=device)
        self._moved_O: Tensor | None = None
        self.optimizer_state: State = method.optimizer.init(self.acc_BN[0])
        self.versions = [0] * num_bases
        """How often each accumulator has changed. Together with its basis this names its content."""
        self.last_basis: int | None = None
        """Basis of the last step. The optimizer's vectors refer to its V."""
        self._touched: dict[int, int] = {}
        """Index of an accumulator with an update -> its basis."""
        self._draws: tuple[tuple[int, ...], Tensor] | None = None
        self._frozen: tuple[int, Any] | None = None

    # --- what is where ----------------------------------------------------------------------------------------------

    def factory(self) -> Callable[[], AdapterState]:
        """A function that makes empty states of the same job. It holds no reference to this state's tensors."""
        return partial(AdapterState, self.method, self.layout, self.job_seed, self.num_bases, self.device)

    def index_of(self, basis: int) -> int:
        """The index of the accumulator of a basis."""
        return basis % self.num_bases

    def accumulator(self, basis: int) -> Tensor:
        """(N,) float32 trained numbers of a basis: a view into `acc_BN`."""
        return self.acc_BN[self.index_of(basis)]

    def touched_bases(self) -> list[int]:
        """The bases with an update, in the order of their accumulators."""
        return [basis for _, basis in sorted(self._touched.items())]

    def mark_touched(self, bases: Iterable[int]) -> None:
        """Say which bases the accumulators hold, after a snapshot has filled them."""
        self._touched = {self.index_of(basis): basis for basis in bases}

    @property
    def moved_O(self) -> Tensor | None:
        """(rows,) the rows of U that have a size, ascending, of coordinates that measure it; None if all move, or while
        nothing is measured."""
        if self._moved_O is None and self.sizes_N is not None:
            rows = self.sizes_N.view(-1, self.coordinates.rank)[:, 0].nonzero().squeeze(1)
            self._moved_O = rows if len(rows) else None
        return self._moved_O

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a snapshot, by name."""
        measured = {"measured_BN": self.measured_BN, "sizes_N": self.sizes_N}
        optimizer = {f"optimizer.{name}": t for name, t in self.optimizer_state.items()}
        return {"acc_BN": self.acc_BN, **{name: t for name, t in measured.items() if t is not None}, **optimizer}

    def digest(self) -> int:
        """64 bits that tell states apart. The device is waited for."""
        hashed = hashlib.blake2b(digest_size=8)
        for name, tensor in self.tensors().items():
            hashed.update(name.encode())
            hashed.update(tensor.detach().cpu().contiguous().numpy().data)
        return int.from_bytes(hashed.digest(), "little")

    # --- factors ----------------------------------------------------------------------------------------------------

    def frozen(self, basis: int) -> Any:
        """What `Coordinates.draw_frozen` gives for the key of a basis, or the V that was measured for it.

        The state keeps the last one drawn only. In `bank` space with M bases it would need M times the memory to keep
        all; it draws again instead.
        """
        if self.measured_BN is not None:
            return self.measured_BN[self.index_of(basis)]
        if self._frozen is None or self._frozen[0] != basis:
            key = noise.derive_key(self.job_seed, BASIS_STREAM, basis)
            self._frozen = basis, self.coordinates.draw_frozen(key, self.layout, self.device)
        return self._frozen[1]

    def factors(self, basis: int, theta_N: Tensor) -> tuple[list[Tensor], Sequence[Any]]:
        """For each module U (O, R) and V (I, R) of the numbers `theta_N`, with the V of a basis. (For V None see
        `Coordinates.module_factors`.)"""
        return self.coordinates.module_factors(theta_N, self.frozen(basis), self.layout)

    def draws(self, keys: Sequence[int]) -> Tensor:
        """(K, M) float32, one `Coordinates.draw` for each key, times `sizes_N` if there is one. The state keeps them
        until a caller asks for other keys.

        So the update after a probe uses the very tensor of the probe. Nothing is lost if the state drops them, because
        the keys give them again.
        """
        wanted = tuple(keys)
        if self._draws is None or self._draws[0] != wanted:
            drawn = [self.coordinates.draw(key, self.layout, self.device) for key in wanted]
            draws_KM = torch.stack(drawn)
            self._draws = wanted, draws_KM if self.sizes_N is None else draws_KM.mul_(self.sizes_N)
        return self._draws[1]

    @property
    def regenerates(self) -> bool:
        """Whether an update draws its directions again (`regenerates`)."""
        return regenerates(self.coordinates, self.device.type)

    def offset(self, plan: ProbePlan, probe: int) -> Tensor:
        """(N,) float32: what a probe adds to the trained numbers. The centre adds nothing and has no offset."""
        p = plan.probes[probe]
        index = plan.keys.index(p.key)
        drawn = self.draws([p.key])[0] if self.regenerates else self.draws(plan.keys)[index]
        direction = self.coordinates.embed(drawn, index, self.layout)
        return direction * (p.sign * p.eps * self.coordinates.scale)

    # --- the step ---------------------------------------------------------------------------------------------------

    def apply(
        self, plan: ProbePlan, coefficients_K: Tensor, learning_rate: float, finite: bool | Tensor = True
    ) -> None:
        """Take the step: the optimizer moves the accumulator of the plan's basis.

        Args:
            plan: the plan of the step. The coefficients belong to its directions, in the order of `plan.keys`.
            coefficients_K: (K,) float32, all zero if a loss was not finite.
            finite: whether all losses were finite, as a bool or as a bool tensor on the device. If not, nothing
                changes.
        """
        index, optimizer = self.index_of(plan.basis), self.method.optimizer
        self._move_optimizer_to(plan.basis)
        state = self.optimizer_state
        # After a loss that is not finite all coefficients are zero. A step without state or decay then changes nothing
        # by itself. The others choose with `where`, because an `if` would make the host wait for the device.
        theta_N, updated = self._update(plan, self.acc_BN[index], coefficients_K, learning_rate)
        if state or optimizer.weight_decay:
            keep = torch.as_tensor(finite, device=self.device)
            theta_N = torch.where(keep, theta_N, self.acc_BN[index])
            updated = {name: torch.where(keep, tensor, state[name]) for name, tensor in updated.items()}
            if optimizer.weight_decay:
                self._decay(learning_rate * optimizer.weight_decay, keep, moved=index)
        self.acc_BN[index] = theta_N
        self.optimizer_state = updated
        self._touched[index] = plan.basis
        # A new version even if nothing moved: to find that out the host would have to wait for the device.
        self.versions[index] += 1

    def _update(
        self, plan: ProbePlan, theta_N: Tensor, coefficients_K: Tensor, learning_rate: float
    ) -> tuple[Tensor, State]:
        optimizer = self.method.optimizer
        keys, draws = plan.keys, partial(self.draws, plan.keys)
        estimate = Estimate(
            self.coordinates, self.layout, keys, draws, coefficients_K.to(self.device), self.regenerates
        )
        # Outside the estimate, as in AdamW: the decay must not enter the optimizer's moments.
        if optimizer.weight_decay:
            theta_N = theta_N * (1.0 - learning_rate * optimizer.weight_decay)
        return optimizer.update(theta_N, estimate, self.optimizer_state, learning_rate)

    def _move_optimizer_to(self, basis: int) -> None:
        """Make the optimizer's vectors refer to the V of `basis`."""
        old, self.last_basis = self.last_basis, basis
        if not self.optimizer_state or old is None or old == basis:
            return
        # Old before new: `frozen` keeps the last one asked for, and the step after this needs the new one.
        frozen_old, frozen_new = self.frozen(old), self.frozen(basis)
        self.optimizer_state = self.method.optimizer.refresh(
            self.optimizer_state,
            lambda vector_N: self.coordinates.transfer(vector_N, frozen_old, frozen_new, self.layout),
        )

    def _decay(self, rate: float, keep: Tensor, moved: int) -> None:
        """Shrink all accumulators but `moved`, which its update has shrunk: the whole adapter decays, not one basis."""
        factor = torch.where(keep, 1.0 - rate, 1.0)
        for index in range(self.num_bases):
            if index != moved:
                self.acc_BN[index] *= factor
                self.versions[index] += 1

    def take(self) -> tuple[int, Tensor] | None:
        """(basis, (N,) accumulator) of a state with one basis, for a fold. The accumulator is zero afterwards.

        Returns None if the state has taken no step since the last fold.
        """
        assert self.num_bases == 1, "only a fold-space state gives its accumulator away"
        if not self._touched:
            return None
        basis, acc_N = self._touched.pop(0), self.acc_BN[0].clone()
        self.acc_BN.zero_()
        return basis, acc_N


def regenerates(coordinates: Coordinates, device_type: str) -> bool:
    """Whether an update on a device of this type ("cpu", "cuda") draws its directions again.

    On a GPU one launch draws and adds them all without storing one. So memory holds one direction only: that of the
    probe which the worker is making. The same generator gives the same directions.
    """
    return device_type == "cuda" and coordinates.draws_normals
