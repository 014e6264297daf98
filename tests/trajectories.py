"""What two runs must share to be the same run, bit for bit: what was logged, and the state they leave behind."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from tests.engines import SENTIMENT, reviews, worker_of
from vllm_zo import LoZO
from vllm_zo.checkpoint.seed_log.format import StepRecord
from vllm_zo.checkpoint.seed_log.reader import read_seed_log

STEPS, INTERVAL = 10, 3
LOZO = LoZO(rank=2, interval=INTERVAL, eps=1e-2)
SPACES: dict[str, dict[str, Any]] = {
    "bank": {"bases": 2},  # returns to its first basis after two intervals
    "fold": {"update_space": "fold"},
}
JOB: dict[str, Any] = {
    "objective": SENTIMENT, "method": LOZO, "steps": STEPS, "batch_size": 4, "seed": 5, "learning_rate": 1e-2,
    "lr_schedule": "linear", "progress": False,
}  # fmt: skip


def train(llm: Any, space: str = "bank", **options: Any) -> Any:
    return llm.finetune(reviews(24, seed=1), **{**JOB, **SPACES[space], **options})


def steps_of(directory: Path) -> tuple[StepRecord, ...]:
    """Every step, with the bits of its coefficients and its learning rate."""
    return read_seed_log(directory / "seeds.log").records


def base_layers(llm: Any) -> dict[str, Any]:
    """vLLM's (packed) linear layers by name."""
    modules = worker_of(llm).model_runner.lora_manager._adapter_manager.modules
    return {name: m.base_layer for name, m in modules.items() if isinstance(m, BaseLinearLayerWithLoRA)}


def base_weights(llm: Any) -> dict[str, Tensor]:
    """The weights that the engine multiplies with, whatever the layers' attributes say: their products with the
    identity, exact because each has a single non-zero term."""
    return {
        name: layer.quant_method.apply(
            layer, torch.eye(layer.input_size, dtype=layer.weight.dtype), None
        ).T.contiguous()
        for name, layer in base_layers(llm).items()
    }


@dataclass
class Trajectory:
    """What a run did and left: compare with `==`, which means bit for bit.

    In `fold` space the state is the engine's base weights, which are restored afterwards.
    """

    steps: tuple[StepRecord, ...]
    state: dict[str, Tensor]

    @classmethod
    def of(cls, llm: Any, run: Any) -> Trajectory:
        if run.config.space == "bank":
            return cls(steps_of(run.directory), {"acc_BN": load_file(run.version_file)["acc_BN"]})
        state = base_weights(llm)
        llm.restore_base(run)
        return cls(steps_of(run.directory), state)

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Trajectory)
        same_state = self.state.keys() == other.state.keys() and all(
            torch.equal(tensor, other.state[name]) for name, tensor in self.state.items()
        )
        return self.steps == other.steps and same_state


def cut_copy(directory: Path, target: Path, num_steps: int, snapshot: bool = False) -> Path:
    """A run's directory as a crash leaves it with `num_steps` steps in the log; its newest snapshot only if asked."""
    names = ["job.json", "train.jsonl", "validation.jsonl", "metrics.jsonl", "seeds.log"]
    target.mkdir()
    for name in [*names, "snapshot.safetensors"] if snapshot else names:
        shutil.copyfile(directory / name, target / name)
    log = read_seed_log(target / "seeds.log")
    with (target / "seeds.log").open("r+b") as file:
        file.truncate(log.offsets[num_steps] + (num_steps < log.num_steps) * 5)  # and the start of one more record
    return target
