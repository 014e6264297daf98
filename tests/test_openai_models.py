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
