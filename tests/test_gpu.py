"""The engine on a CUDA device: it follows the same oracle as on a CPU, eagerly and with CUDA graphs, and waits for the
device nowhere in a step. Without one these tests skip, and say so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.engines import SENTIMENT, Engines, reviews, worker_of
from tests.test_engine_equivalence import reference
from vllm_zo import LoZO
from vllm_zo.commands import CloseGroup, Materialise, OpenGroup
from vllm_zo.data import BatchOrder, encode_examples

pytestmark = pytest.mark.gpu

METHOD = LoZO(rank=2, interval=6, eps=5e-2)
STEPS, BATCH, SEED, RATE = 20, 4, 3, 1e-3
LOSS_TOLERANCE = 2e-2
"""Nats. float16 keeps 11 bits, 5e-4 of a value; logits here are of size 1 to 10, and two layers and the weights' own
rounding add a few such errors. A wrong slot, sign or row moves a loss by 0.1 and more (the spread is checked below)."""
GRAD_TOLERANCE = LOSS_TOLERANCE / METHOD.eps
SMALL_GRAPHS = {"cudagraph_capture_sizes": [16, 32, 64, 128, 256]}
ENGINES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "compiled, with graphs": {"compilation_config": SMALL_GRAPHS},
}


def engine(engines: Engines, **options: Any) -> Any:
    return engines.get(dtype="float16", gpu_memory_utilization=0.2, **options)


def train(llm: Any, space: str, steps: int = STEPS) -> Any:
    return llm.finetune(
        reviews(24, seed=1), objective=SENTIMENT, method=METHOD, learning_rate=RATE, batch_size=BATCH, steps=steps,
        seed=SEED, update_space=space, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("space", ["bank", "fold"])
@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
def test_losses_of_twenty_steps_are_those_of_the_plain_reference(
    engines: Engines, options: dict[str, Any], space: str
) -> None:
    llm = engine(engines, **options)
    run = train(llm, space)
    if space == "fold":
        llm.restore_base(run)
    oracle = reference(engines, {"method": METHOD}, space, num_bases=4 if space == "bank" else 1)
    tokenizer = AutoTokenizer.from_pretrained(engines.model("opt"))
    examples = encode_examples(reviews(24, seed=1), SENTIMENT, tokenizer, 128, "rows")
    order = BatchOrder(len(examples), BATCH, SEED)
    spreads = []
    for step, record in enumerate(run.history):
        losses_PE, coefficients_K = oracle.step(step, [examples[i] for i in order.batch(step)], RATE)
        spreads.append(abs(float(losses_PE[0].mean() - losses_PE[1].mean())))
        assert record["loss"] == pytest.approx(losses_PE.mean().item(), abs=LOSS_TOLERANCE), f"step {step}"
        assert record["coefficients"] == pytest.approx(coefficients_K.tolist(), abs=GRAD_TOLERANCE), f"step {step}"
    assert len(spreads) == STEPS
    assert max(spreads) > 5 * LOSS_TOLERANCE


FIRST_CALLS = 12
"""Of a job, not looked at: its tables go to the device, and its first step compiles what is new to it."""


@pytest.fixture
def guard() -> Any:
    """Sets torch's sync debug mode for the length of a call, but for the first calls."""

    def guarded(call: Callable[..., Any], mode: str) -> Callable[..., Any]:
        calls = 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            torch.cuda.set_sync_debug_mode(mode if calls > FIRST_CALLS else "default")
            try:
                return call(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    return guarded


def test_no_command_of_a_step_and_no_score_waits_for_the_device(
    engines: Engines, guard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(engines, **ENGINES["compiled, with graphs"])
    train(llm, "bank", steps=2)  # kernels are compiled, slot writers are made
    trainer = worker_of(llm).zo
    execute = trainer.execute
    guarded = guard(execute, "error")

    def of_a_step(command: Any) -> None:
        (guarded if isinstance(command, OpenGroup | Materialise | CloseGroup) else execute)(command)

    monkeypatch.setattr(trainer, "execute", of_a_step)
    monkeypatch.setattr(trainer, "score", guard(trainer.score, "error"))
    assert train(llm, "bank").status == "succeeded"


def test_what_waits_in_a_whole_engine_step_is_none_of_ours(
    engines: Engines, guard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own part of the step is only reported (pytest shows it with -rA): it is not ours to fix."""
    llm = engine(engines, **ENGINES["compiled, with graphs"])
    train(llm, "bank", steps=2)
    worker = worker_of(llm)
    for name in ("execute_model", "sample_tokens"):
        monkeypatch.setattr(worker, name, guard(getattr(worker, name), "warn"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(llm, "bank")
    waits = sorted({f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)})
    print("waits in a step:", *waits, sep="\n  ")
    starting_and_publishing = ("published.py", "snapshot.py", "state.py")  # once a job, and when a file is written
    ours = [w for w in waits if "vllm_zo" in w and not any(name in w for name in starting_and_publishing)]
    assert not ours
