"""Which fine-tuned models a server answers for after a restart."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_zo.checkpoint.adapter_files import CONFIG, WEIGHTS
from vllm_zo.entrypoints.server.models import vllm_models
from vllm_zo.entrypoints.server.models.names import ModelNames
from vllm_zo.entrypoints.server.state.directory import StateDir
from vllm_zo.entrypoints.server.state.store import Store


class Serving:
    """vLLM's side: what is served, by name."""

    base_names = ("base",)
    max_model_len = 128

    def __init__(self) -> None:
        self.served: dict[str, Path] = {}

    async def add(self, name: str, directory: Path, owner: str) -> None:
        self.served[name] = directory

    def restore(self, name: str, directory: Path, owner: str) -> None:
        self.served[name] = directory

    def point(self, alias: str, name: str) -> None:
        self.served[alias] = self.served[name]

    def names(self) -> list[str]:
        return list(self.served)


def write_adapter(directory: Path, value: float) -> None:
    directory.mkdir(parents=True)
    save_file({"a": torch.full((4, 4), value)}, directory / WEIGHTS)
    (directory / CONFIG).write_text("{}")


async def announce(root: Path) -> tuple[StateDir, Store]:
    """Checkpoints of three jobs, made on base "one"."""
    state = StateDir(root).acquire()
    store = Store(state.database)
    names = ModelNames(state, store, Serving(), None, base="one")  # type: ignore[arg-type]
    for job_id in ("a", "b", "c"):
        write_adapter(state.checkpoint(job_id, 5), value=1.0)
        job: Any = SimpleNamespace(id=job_id, owner="")
        await names.announce(job, f"ft:{job_id}", 5, "checkpoint")
    return state, store


def restored(state: StateDir, store: Store, base: str) -> tuple[list[str], list[str]]:
    """Names that are served, and ids that are listed, after a start with a base model."""
    serving = Serving()
    names: Any = ModelNames(state, store, serving, SimpleNamespace(), base=base)  # type: ignore[arg-type]
    names.restore()
    return serving.names(), [card["id"] for card in names.listed()]


@pytest.mark.parametrize("damage", ["cut off", "other weights", "gone"])
def test_a_damaged_adapter_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    state, store = asyncio.run(announce(tmp_path))
    weights = state.checkpoint("b", 5) / WEIGHTS
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif damage == "other weights":
        save_file({"a": torch.full((4, 4), 2.0)}, weights)
    else:
        weights.unlink()
    logging.getLogger("vllm.zo.server").addHandler(caplog.handler)
    served, listed = restored(state, store, "one")
    assert served == ["ft:a", "job:a", "ft:c", "job:c"] and listed == ["base", *served]
    assert "model ft:b is not served: " in caplog.text and str(weights.parent) in caplog.text
    store.close()


def test_adapters_of_another_base_are_not_served_and_come_back_with_theirs(tmp_path: Path) -> None:
    state, store = asyncio.run(announce(tmp_path))
    assert restored(state, store, "two") == ([], ["base"])
    served, listed = restored(state, store, "one")
    assert len(served) == 6 and listed == ["base", *served]
    store.close()


def test_files_go_when_no_request_uses_them_under_any_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A final model and its last checkpoint are one directory. The engine ends if that is gone when it starts a request
    for it, as it was when both were deleted while a request for the first one waited."""
    monkeypatch.setattr(vllm_models, "ON_ITS_WAY_S", 0.01)
    running: dict[str, Any] = {}

    async def nothing(*args: Any) -> None: ...

    async def delete_both() -> None:
        engine = SimpleNamespace(
            output_processor=SimpleNamespace(request_states=running), add_lora=nothing, remove_lora=nothing
        )
        models = SimpleNamespace(
            base_model_paths=[], lora_requests={}, lora_id_counter=SimpleNamespace(inc=lambda by: by)
        )
        state = StateDir(tmp_path).acquire()
        names = ModelNames(state, Store(state.database), vllm_models.Serving(models, engine), None, base="one")
        write_adapter(directory := state.checkpoint("a", 5), value=1.0)
        job: Any = SimpleNamespace(id="a", owner="")
        await names.announce(job, "ft:a:ckpt", 5, "checkpoint")
        await names.announce(job, "ft:a", 5, "final")
        running["r"] = SimpleNamespace(lora_request=models.lora_requests["ft:a"])
        await names.unload("ft:a", delete=True)
        await names.unload("ft:a:ckpt", delete=True)
        await asyncio.sleep(0.3)
        assert directory.exists(), "a request still waits for it"
        running.clear()
        for _ in range(100):
            await asyncio.sleep(0.05 if directory.exists() else 0)
        assert not directory.exists()

    asyncio.run(delete_both())
