"""How a state becomes an adapter: rank blocks side by side, `delta W = [U_0, U_1, ...] [V_0, V_1, ...]^T`.

The state and a perturbation have blocks of their own. In 16 bits, their sum would round the smaller one away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_zo.methods.coordinates import Coordinates
from vllm_zo.methods.plan import ModuleShape, ProbePlan
from vllm_zo.methods.state import AdapterState

ZERO_TAG = "zero"
"""The tag of a factor that is all zeros."""


@dataclass(frozen=True)
class RankBlock:
    """R columns of both factors of every module. Its functions make the tensors only when the worker asks for them.

    Blocks with equal tags hold equal numbers. So the worker writes a block into a slot only if the slot has another
    tag there.

    Attributes:
        index: the block's columns of the adapter start at index * R.
        u_tag, v_tag: name the content of a factor.
        u, v: make the flat float32 factors (N_U,) and (N_V,). `u` None stands for zeros.
    """

    index: int
    u_tag: object
    v_tag: object
    u: Callable[[], Tensor] | None
    v: Callable[[], Tensor]


def num_blocks(coordinates: Coordinates, num_bases: int) -> int:
    """How many rank blocks the adapter of a probe has."""
    if not coordinates.has_factors:
        return 0
    if coordinates.trains_v:
        return 3
    return 1 if coordinates.folds_every_step else num_bases + 1


def probe_blocks(state: AdapterState, plan: ProbePlan, probe: int) -> list[RankBlock]:
    """The adapter of one probe. (dU, dV) is the perturbation, U_b the accumulated update of basis b.

    only U is trained          [dU, U_0, U_1, ...] [V_now, V_0, V_1, ...]^T
    U and V are trained        [dU, U, U] [V + dV, V, dV]^T
    V changes at every step    [dU] [V_now]^T for a probe, [U] [V]^T for the centre
    no factors                 nothing: the worker writes the probe into the base weights
    the base itself            nothing
    """
    if not state.coordinates.has_factors or plan.of_base:
        return []
    if state.coordinates.trains_v:
        return _blocks_of_two_factors(state, plan, probe)
    centre = plan.probes[probe].sign == 0
    accumulated = [_accumulated(state, basis) for basis in state.touched_bases()]
    if state.coordinates.folds_every_step and accumulated:
        # A training step folds before the worker makes its probes, so only an evaluation meets an accumulator.
        assert centre, "a probe of a step before the fold of the one before"
        (block,) = accumulated
        return [RankBlock(0, block.u_tag, block.v_tag, block.u, block.v)]
    return [_perturbation(state, plan, probe), *accumulated]


def _perturbation(state: AdapterState, plan: ProbePlan, probe: int) -> RankBlock:
    p, basis, coordinates = plan.probes[probe], plan.basis, state.coordinates

    def u() -> Tensor:
        return coordinates.factor_changes(state.offset(plan, probe), state.frozen(basis), state.layout)[0]

    def v() -> Tensor:
        return coordinates.factors(state.accumulator(basis), state.frozen(basis), state.layout)[1]

    # The tag of V is the basis alone, in both cases: V stays in the slot while U changes with every probe.
    if p.sign == 0:
        return RankBlock(0, ZERO_TAG, basis, None, v)
    return RankBlock(0, (plan.step, p), basis, u, v)


def _accumulated(state: AdapterState, basis: int) -> RankBlock:
    index = state.index_of(basis)

    def factors() -> tuple[Tensor, Tensor]:
        return state.coordinates.factors(state.accumulator(basis), state.frozen(basis), state.layout)

    u_tag = basis, state.versions[index]
    return RankBlock(1 + index, u_tag, basis, lambda: factors()[0], lambda: factors()[1])


def _blocks_of_two_factors(state: AdapterState, plan: ProbePlan, probe: int) -> list[RankBlock]:
    """The blocks of `(U + dU) (V + dV)^T`, multiplied out so that no factor adds dU to U.

    In 16 bits, U + dU would round most of dU away. One sum remains, V + dV beside dU.
    """
    p, basis, coordinates = plan.probes[probe], plan.basis, state.coordinates
    version = basis, state.versions[state.index_of(basis)]
    moved = plan.step, p

    def factors() -> tuple[Tensor, Tensor]:
        return coordinates.factors(state.accumulator(basis), state.frozen(basis), state.layout)

    def changes() -> tuple[Tensor, Tensor]:
        du_N, dv_N = coordinates.factor_changes(state.offset(plan, probe), state.frozen(basis), state.layout)
        assert dv_N is not None
        return du_N, dv_N

    unperturbed = RankBlock(1, version, version, lambda: factors()[0], lambda: factors()[1])
    if p.sign == 0:
        return [unperturbed]
    # dU (V + dV)^T + U V^T + U dV^T. The middle one has the same index and tags for every probe of a step, so the
    # worker writes it into a slot once per step.
    return [
        RankBlock(0, moved, (version, moved), lambda: changes()[0], lambda: factors()[1] + changes()[1]),
        unperturbed,
        RankBlock(2, version, moved, lambda: factors()[0], lambda: changes()[1]),
    ]


def whole_adapter(state: AdapterState) -> Iterator[tuple[ModuleShape, Tensor, Tensor]]:
    """The whole change of every module as one pair of factors: `[U_b, ...] [V_b, ...]^T` over the bases with an update.

    Yields:
        (module, U (O, b * R), V (I, b * R)), float32 on the state's device, where b counts those bases. Before the
        first step b is 1 and U is zero.
    """
    # Before the first step basis 0 stands in, with U = 0: an adapter has at least one block of columns.
    parts = [state.factors(basis, state.accumulator(basis)) for basis in state.touched_bases() or [0]]
    for index, module in enumerate(state.layout.modules):
        yield module, torch.cat([u[index] for u, _ in parts], dim=1), torch.cat([v[index] for _, v in parts], dim=1)
