"""What an optimizer remembers is part of the state: resuming equals not stopping, and the log alone rebuilds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.engines import Engines
from tests.trajectories import LOZO, STEPS, cut_copy, steps_of, train
from vllm_zo import Adam, MeZOLoRA, Momentum, TeZO
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.methods import MEAZO, SGD, Muon

METHODS = {
    "adam": replace(LOZO, optimizer=Adam(beta2=0.9)),
    "lozo-m": replace(LOZO, optimizer=Momentum()),
    "meazo": replace(LOZO, optimizer=MEAZO()),
    "muon": replace(LOZO, optimizer=Muon(beta=0.9)),
    "weight decay": replace(LOZO, optimizer=SGD(weight_decay=3.0)),
    "tezo with adam": TeZO(rank=4, eps=1e-2, optimizer=Adam()),
    "mezo-lora with adam": MeZOLoRA(rank=4, optimizer=Adam()),
}


def final_state(run: Any) -> dict[str, Tensor]:
    return load_file(run.version_file)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", METHODS)
def test_resuming_and_replaying_give_the_same_bits(engines: Engines, name: str, tmp_path: Path) -> None:
    """Cut once where the snapshot helps (after its third step) and once where only the log is there."""
    llm, method = engines.get(), METHODS[name]
    options: dict[str, Any] = {"method": method, "checkpoint_interval": 3}
    if name in ("tezo with adam", "mezo-lora with adam"):
        options["bases"] = 1
    unbroken = train(llm, **options)
    assert len(final_state(unbroken)) == 1 + len(method.optimizer.init(torch.zeros(1)))
    assert_same(rebuild_state(read_seed_log(unbroken.directory / "seeds.log")).tensors(), final_state(unbroken))
    for step, snapshot in ((4, False), (STEPS - 1, True)):
        directory = cut_copy(unbroken.directory, tmp_path / f"cut-{step}", step, snapshot)
        resumed = train(llm, resume_from=directory, **options)
        assert steps_of(resumed.directory) == steps_of(unbroken.directory)
        assert_same(final_state(resumed), final_state(unbroken))


def test_momentum_goes_on_through_folds_and_a_resume(engines: Engines, tmp_path: Path) -> None:
    llm = engines.get()
    options: dict[str, Any] = {"method": METHODS["lozo-m"], "space": "fold"}
    unbroken = train(llm, **options)
    llm.restore_base(unbroken)
    resumed = train(llm, resume_from=cut_copy(unbroken.directory, tmp_path / "cut", 5), **options)
    llm.restore_base(resumed)
    assert steps_of(resumed.directory) == steps_of(unbroken.directory)


def test_a_published_version_is_the_replay_of_the_log_up_to_its_step(engines: Engines) -> None:
    run = train(engines.get(), method=METHODS["adam"], publish_interval=1)
    published = sorted(int(path.stem.removeprefix("step-")) for path in run.directory.glob("step-*.safetensors"))
    assert published == list(range(1, STEPS + 1))
    log = read_seed_log(run.directory / "seeds.log")
    for step in (3, 7):
        state = load_file(run.directory / f"step-{step}.safetensors")
        assert_same(rebuild_state(log, step).tensors(), state)
