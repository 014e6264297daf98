"""Dense MeZO writes the base weights for every probe: nothing may drift, and what is left is what was trained."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tests.engines import SENTIMENT, Engines, reviews
from tests.trajectories import base_weights, cut_copy, steps_of
from vllm_zo import ConfigError, MeZO
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import read_seed_log

JOB: dict[str, Any] = {
    "objective": SENTIMENT, "method": MeZO(eps=1e-2), "batch_size": 2, "seed": 5, "progress": False,
}  # fmt: skip


def assert_weights_stay(llm: Any, steps: int) -> float:
    """Two probes a step, learning rate 0; returns milliseconds a step."""
    before = base_weights(llm)
    start = time.perf_counter()
    run = llm.finetune(reviews(8, longest=6), steps=steps, learning_rate=0.0, **JOB)
    seconds = time.perf_counter() - start
    assert len(run.history) == steps and len({record["loss_plus"] for record in run.history}) > steps // 2
    after = base_weights(llm)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    llm.restore_base(run)
    assert all(torch.equal(base_weights(llm)[name], weight) for name, weight in before.items())
    return 1e3 * seconds / steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_300_probes_leave_no_trace_in_the_weights(engines: Engines, dtype: str) -> None:
    print(f"{dtype}: {assert_weights_stay(engines.get(dtype=dtype), 150):.1f} ms a step of two probes")


@pytest.mark.slow
def test_3000_probes_leave_no_trace_in_the_weights(engines: Engines) -> None:
    assert_weights_stay(engines.get(dtype="bfloat16"), 1500)


def test_the_model_left_is_the_original_plus_the_logged_update_and_resuming_is_not_stopping(
    engines: Engines, tmp_path: Any
) -> None:
    llm = engines.get()
    before = base_weights(llm)
    rows = reviews(12, seed=1)
    run = llm.finetune(rows, steps=8, learning_rate=1e-4, **JOB)
    after = base_weights(llm)
    log = read_seed_log(run.directory / "seeds.log")
    state = rebuild_state(log)
    changes = dict(zip([m.name for m in log.header.modules], state.factors(0, state.acc_BN[0])[0], strict=True))
    name = next(n for n in after if n.endswith("fc1"))
    assert torch.equal(after[name], before[name] + changes[name]) and not torch.equal(after[name], before[name])
    with pytest.raises(ConfigError, match="has changed the base weights"):
        llm.finetune(rows, steps=1, learning_rate=0.0, **JOB)
    llm.restore_base(run)
    resumed = llm.finetune(
        rows, steps=8, learning_rate=1e-4, resume_from=cut_copy(run.directory, tmp_path / "cut", 5), **JOB
    )
    assert steps_of(resumed.directory) == steps_of(run.directory)
    assert all(torch.equal(base_weights(llm)[n], weight) for n, weight in after.items())
    run.save_merged(tmp_path / "merged")
    from safetensors.torch import load_file

    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged[f"{name}.weight"], after[name])
    llm.restore_base(resumed)


def test_a_bank_is_refused_with_the_reason(engines: Engines) -> None:
    with pytest.raises(ConfigError, match=r"mezo cannot run in it .a dense change is no adapter"):
        engines.get().finetune(reviews(8), update_space="bank", steps=1, **JOB)
