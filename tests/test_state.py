"""AdapterState and FactorLayout: what every rank, and a replay, must agree on."""

from __future__ import annotations

import pytest
import torch

from vllm_zo import noise
from vllm_zo.methods import METHODS, LoZO
from vllm_zo.methods.base import Method
from vllm_zo.methods.layout import FactorLayout
from vllm_zo.methods.plan import ModuleShape
from vllm_zo.methods.state import AdapterState

MODULES = (
    ModuleShape("layers.0.q_proj", 6, 10),
    ModuleShape("layers.0.k_proj", 6, 10),
    ModuleShape("layers.0.fc1", 14, 6),
)
RANK = 3  # odd: with it, modules start inside a block of four noise elements


def make_state(num_bases: int = 1, layout: FactorLayout | None = None, job_seed: int = 5) -> AdapterState:
    method = LoZO(rank=RANK, interval=2, queries=2)
    return AdapterState(method, layout or FactorLayout(MODULES, RANK), job_seed, num_bases)


def test_flat_vectors_hold_every_module_in_order_and_shape() -> None:
    layout = FactorLayout(MODULES, RANK)
    assert layout.u_ranges.total == RANK * (6 + 6 + 14)
    assert layout.v_ranges.total == RANK * (10 + 10 + 6)
    flat = torch.arange(layout.u_ranges.total, dtype=torch.float32)
    parts = layout.split_u(flat)
    assert [tuple(p.shape) for p in parts] == [(6, RANK), (6, RANK), (14, RANK)]
    assert torch.equal(torch.cat([p.reshape(-1) for p in parts]), flat)
    assert [tuple(p.shape) for p in layout.split_u(flat.expand(4, -1))] == [(4, 6, RANK), (4, 6, RANK), (4, 14, RANK)]


def test_modules_of_equal_shape_do_not_share_noise() -> None:
    state = make_state()
    q_proj, k_proj, _ = state.layout.split_u(state.draws([11])[0])
    assert not torch.isclose(q_proj, k_proj).any()
    q_proj, k_proj, _ = state.layout.split_v(state.frozen(0))
    assert not torch.isclose(q_proj, k_proj).any()


def test_v_depends_on_the_job_and_on_the_basis_only() -> None:
    assert torch.equal(make_state().frozen(3), make_state(num_bases=4).frozen(3))
    assert not torch.isclose(make_state().frozen(3), make_state().frozen(4)).any()
    assert not torch.isclose(make_state().frozen(3), make_state(job_seed=6).frozen(3)).any()


def test_a_direction_is_a_function_of_its_seed_whoever_is_asked_for_with_it() -> None:
    state = make_state()
    together = state.draws([11, 12])
    assert torch.equal(state.draws([12])[0], together[1])
    assert torch.equal(together[0], noise.normal(11, state.layout.u_ranges, "cpu"))


def test_the_update_uses_the_tensor_that_was_probed_and_other_keys_replace_it() -> None:
    state = make_state()
    probed = state.draws([11, 12])
    assert state.draws([11, 12]) is probed
    assert state.draws([12, 11]) is not probed
    assert torch.equal(state.draws([11, 12]), probed)


DRAW_OTHERWISE = {"fzoo", "eggroll"}
"""Random signs; columns of their own for each direction."""


@pytest.mark.parametrize("method", [*map(METHODS.build, METHODS), LoZO(queries=2), LoZO(queries=16)], ids=str)
def test_an_update_from_regenerated_directions_is_the_update(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, by the plain sum; the fused one is held against it in tests/test_noise.py."""
    wide = tuple(ModuleShape(m.name, 12 + m.out_features, 12 + m.in_features) for m in MODULES)
    layout = FactorLayout(wide, method.coordinates.rank)
    state, other = (AdapterState(method, layout, 5, 1) for _ in range(2))
    plan = method.plan(5, 0, 0)
    coefficients = torch.randn(len(plan.keys), generator=torch.Generator().manual_seed(0))
    state.apply(plan, coefficients, 0.1)
    wanted = method.coordinates.draws_normals
    assert wanted == (method.name not in DRAW_OTHERWISE)
    monkeypatch.setattr(AdapterState, "regenerates", wanted)
    for probe, p in enumerate(plan.probes):
        if p.sign:
            assert torch.equal(other.offset(plan, probe), state.offset(plan, probe))
    if wanted:
        monkeypatch.setattr(other, "draws", lambda seeds: pytest.fail("what was stored is read"))
    other.apply(plan, coefficients, 0.1)
    assert torch.equal(other.acc_BN, state.acc_BN) and state.acc_BN.any()


def test_an_update_moves_the_accumulator_of_its_basis_only() -> None:
    state = make_state(num_bases=3)
    state.acc_BN.normal_(generator=torch.Generator().manual_seed(0))
    before = state.acc_BN.clone()
    state.apply(state.method.plan(5, 8, basis=4), torch.tensor([1.0, 1.0]), 0.1)  # basis 4 of 3 is row 1
    assert torch.equal(state.acc_BN[[0, 2]], before[[0, 2]])
    assert not torch.isclose(state.acc_BN[1], before[1]).any()


def test_the_state_knows_which_bases_it_holds() -> None:
    state = make_state(num_bases=3)
    assert state.touched_bases() == [] and state.versions == [0, 0, 0]
    for step, basis in enumerate([0, 1, 1, 4]):
        state.apply(state.method.plan(5, step, basis), torch.tensor([1.0, 1.0]), 0.1)
    assert state.touched_bases() == [0, 4] and state.versions == [1, 3, 0]
    loaded = make_state(num_bases=3)
    loaded.mark_touched([4, 0])
    assert loaded.touched_bases() == state.touched_bases()


def test_what_is_taken_to_be_folded_is_gone_from_the_state() -> None:
    state = make_state()
    assert state.take() is None
    state.apply(state.method.plan(5, 8, basis=4), torch.tensor([1.0, 1.0]), 0.1)
    acc = state.acc_BN[0].clone()
    taken = state.take()
    assert taken is not None and taken[0] == 4 and torch.equal(taken[1], acc)
    assert (state.acc_BN == 0).all() and state.take() is None


@pytest.mark.parametrize(("coefficients", "learning_rate"), [([0.0, 0.0], 0.1), ([3.0, -4.0], 0.0)])
def test_masked_coefficients_or_a_zero_learning_rate_change_nothing(
    coefficients: list[float], learning_rate: float
) -> None:
    state = make_state()
    state.acc_BN.normal_(generator=torch.Generator().manual_seed(0))
    before = state.acc_BN.clone()
    state.apply(state.method.plan(5, 0, 0), torch.tensor(coefficients), learning_rate)
    assert torch.equal(state.acc_BN, before)
