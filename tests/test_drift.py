"""How far updates have moved, against dense matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.seed_logs import header_of, random_log
from vllm_zo.checkpoint.export import export_peft, read_peft
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.methods import LoZO, drift
from vllm_zo.methods.adapter import whole_adapter


def test_norm_and_distance_of_exported_updates_are_those_of_dense_matrices(tmp_path: Path) -> None:
    log = random_log(header_of(LoZO(rank=2, interval=3), "bank", 3), 8)
    adapters, dense = [], []
    for step in (4, 8):  # the later one has more columns
        state = rebuild_state(log, step)
        export_peft(state, "no/model", tmp_path / str(step))
        adapters.append(read_peft(tmp_path / str(step)))
        dense.append({m.name: u.double() @ v.double().T for m, u, v in whole_adapter(state)})
        expected = sum(w.square().sum() for w in dense[-1].values()).sqrt()
        assert drift.norm(adapters[-1].values()) == pytest.approx(expected.item(), rel=1e-9)
    between = torch.stack([(dense[0][m] - dense[1][m]).square().sum() for m in dense[0]]).sum().sqrt().item()
    assert between > 0
    assert drift.distance(*adapters) == pytest.approx(between, rel=1e-9)
    # Half the digits: what cancels is squared.
    assert drift.distance(adapters[0], adapters[0]) == pytest.approx(0.0, abs=1e-6 * between)
