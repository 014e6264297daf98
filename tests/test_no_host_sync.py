"""Nothing in a step waits for the device: on a GPU that would hold up the scheduling of the next one.

There is no GPU here, so the ops themselves are looked at: those that must read the device's memory to go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engines import Engines, reviews, worker_of
from tests.test_seams import RUN
from vllm_zo import LanguageModeling, LoZO, methods
from vllm_zo.commands import ApplyRecord, CloseGroup, Materialise, OpenGroup, ReportCells

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default, aten._unique2.default, aten.unique_dim.default, aten.nonzero.default,
    aten.masked_select.default, aten.is_nonzero.default, aten.equal.default,
}  # fmt: skip


class WaitsForDevice(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Raises where an op would make the host wait for a CUDA device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func in (aten.index.Tensor, aten.index_put_.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in WAITING or masked:
            raise WaitsForDevice(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [torch.Tensor.item, torch.unique, torch.nonzero, lambda t: t[t > 0], bool])
def test_the_guard_sees_an_op_that_waits(op: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(WaitsForDevice), NoWaiting():
        op(torch.ones(1))


METHODS: dict[str, Any] = {
    "lozo": LoZO(queries=2, interval=2),
    "adam": LoZO(optimizer="adam", interval=2),
    "fzoo": methods.METHODS.build("fzoo"),
    "subzero": methods.METHODS.build("subzero"),
    "mezo-lora": methods.METHODS.build("mezo-lora"),
}


@pytest.fixture
def llm(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine whose steps are guarded. Starting, folding and publishing read and write files or weights."""
    engine = engines.get()
    trainer = worker_of(engine).zo
    execute, score = trainer.execute, trainer.score

    def guarded(command: Any) -> None:
        if isinstance(command, OpenGroup | Materialise | CloseGroup | ReportCells | ApplyRecord):
            with NoWaiting():
                execute(command)
        else:
            execute(command)

    def guarded_score(*args: Any) -> None:
        with NoWaiting():
            score(*args)

    monkeypatch.setattr(trainer, "execute", guarded)
    monkeypatch.setattr(trainer, "score", guarded_score)
    return engine


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_command_and_no_score_of_a_step_waits(llm: Any, method: Any) -> None:
    assert llm.finetune(reviews(16), steps=4, method=method, **RUN).status == "succeeded"


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_no_command_of_the_log_path_waits(llm: Any, optimizer: str) -> None:
    method = LoZO(queries=2, interval=2, optimizer=optimizer)
    assert llm.finetune(reviews(16), steps=4, method=method, shards=3, **RUN).status == "succeeded"


def test_scoring_log_probabilities_does_not_wait(llm: Any) -> None:
    rows = [{"prompt": r["sentence"], "completion": " It was great"} for r in reviews(8)]
    assert llm.finetune(rows, steps=2, **{**RUN, "objective": LanguageModeling()}).status == "succeeded"
