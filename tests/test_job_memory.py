"""A job that the machine has no memory for is refused with the figure and the bound, before it does anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import Engines, reviews
from tests.openai_app import BASE, app_client, upload
from tests.openai_server import SENTIMENT, jsonl
from tests.trajectories import train
from vllm_zo import ConfigError, JobError, LoZO, job_memory
from vllm_zo.entrypoints.server.jobs import prepare
from vllm_zo.job_memory import GIB, free_memory, state_bytes
from vllm_zo.methods import METHODS
from vllm_zo.methods.base import Method
from vllm_zo.methods.plan import ModuleShape
from vllm_zo.methods.state import AdapterState
from vllm_zo.worker import trainer

MODULES = tuple(ModuleShape(f"model.layers.{i}.mlp.up_proj", 96, 64) for i in range(4))
JOBS = "/v1/fine_tuning/jobs"
MIB = 1 << 20


@pytest.mark.parametrize("method", [*(METHODS[name]() for name in METHODS), LoZO(v="activations")], ids=str)
def test_a_state_takes_no_more_than_was_calculated(method: Method) -> None:
    bases = 1 if not method.coordinates.has_factors else 3
    layout = method.layout(MODULES)
    state = AdapterState(method, layout, job_seed=1, num_bases=bases)
    plan = method.plan(0, 0, 0)
    tensors = [*state.tensors().values(), state.draws(plan.keys), *state.factors(0, state.acc_BN[0])[0]]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert held <= state_bytes(method, MODULES, bases) < 30 * held


def test_directions_bases_and_rank_count() -> None:
    little = state_bytes(LoZO(rank=2), MODULES, 2)
    head = (ModuleShape("lm_head", 512, 256),)
    moment = 3 * 8 * 256**2
    assert state_bytes(LoZO(v="activations"), head, 2) > state_bytes(LoZO(), head, 2) + moment
    for method, bases in ((LoZO(rank=2, queries=100), 2), (LoZO(rank=20), 2), (LoZO(rank=2), 40)):
        assert state_bytes(method, MODULES, bases) > 5 * little
    several = state_bytes(LoZO(rank=2, queries=100), MODULES, 2)
    assert state_bytes(LoZO(rank=2, queries=100), MODULES, 2, regenerates=True) < several / 5


def test_the_limit_of_a_container_counts_and_its_copies_of_files_do_not(tmp_path: Path) -> None:
    for name, text in (
        ("max", "3000\n"),
        ("current", "2900\n"),
        ("stat", "anon 1\nactive_file 100\ninactive_file 500\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory(tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > MIB


def test_a_devices_memory_that_pytorch_keeps_for_itself_is_free_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, answer in (("mem_get_info", (100, 1000)), ("memory_reserved", 50), ("memory_allocated", 30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert job_memory.free_on(torch.device("cuda")) == 100 + 20


def test_a_worker_refuses_a_job_that_does_not_fit_before_any_work(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, directory = engines.get(), tmp_path / "job"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "free_on", lambda device: 10_000)
        with pytest.raises(JobError, match=r"the job's state takes \S+ GiB, and 9.31e-06 GiB are free; lower one"):
            train(llm, output_dir=str(directory))
    assert not (directory / "seeds.log").exists() and not (directory / "metrics.jsonl").exists()
    assert train(llm, resume_from=directory).status == "succeeded", "with room it goes on as if nothing had been"


def test_rows_that_do_not_fit_into_the_engine_are_refused_before_a_job_is_made(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(job_memory, "free_memory", lambda: 10_000)
        with pytest.raises(ConfigError, match=r"24 rows, \d+ tokens: they take .* GiB are free; use fewer rows"):
            train(engines.get(), output_dir=str(tmp_path / "job"))
    assert not (tmp_path / "job").exists()


def test_a_server_refuses_a_job_that_does_not_fit_when_it_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tuple(ModuleShape(f"model.layers.{i}.mlp.up_proj", 16_384, 4096) for i in range(32))
    monkeypatch.setattr(prepare, "free_memory", lambda: 8 * GIB)
    with app_client(tmp_path / "state", modules) as client:
        file_id = upload(client, jsonl(reviews(16))).json()["id"]

        def answer(**hyperparameters: Any) -> Any:
            method = {"hyperparameters": {"rank": 2, "batch_size": 1, **hyperparameters}, "objective": SENTIMENT}
            body = {"model": BASE, "training_file": file_id, "method": {"type": "zeroth_order", "zeroth_order": method}}
            return client.post(JOBS, json=body)

        refused = answer(queries=2000)
        assert refused.status_code == 400, "queries within the bound on sequences, and 16 GiB of directions"
        message = refused.json()["error"]["message"]
        assert "queries=2000" in message and "the job's state takes 15" in message and "8 GiB are free" in message
        assert client.get(JOBS).json()["data"] == []
        none = answer(queries=2000, target_modules=r"model\.layers\.0\..*")
        assert none.status_code == 200, "fewer modules fit"
