"""The engine against the oracle: every run below must follow the naive trainer step by step.

Tolerances: both sides run float32 forwards of a 2-layer model, whose losses differ by a few 1e-6 nats (order of
summation).
A projected gradient divides that by 2 eps; EPS is large here so that it stays near 1e-4. Estimates that divide by the
spread of the losses, or directions longer than LoZO's, have tolerances of their own (`grad_tolerance`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engines import SENTIMENT, Engines, reviews, scheduler_of
from tests.reference import ReferenceTrainer
from vllm_zo import FactorizedMeZO, LanguageModeling, LoZO, MultipleChoice
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.checkpoint.snapshot import load_snapshot
from vllm_zo.data import BatchOrder, encode_examples
from vllm_zo.methods import (
    EGGROLL,
    FZOO,
    SGD,
    Adam,
    LeaveOneOut,
    LoRAFA,
    MeZO,
    MeZOLoRA,
    Momentum,
    SubZero,
    TeZO,
)
from vllm_zo.methods.schedules import eps_factor_at
from vllm_zo.methods.state import AdapterState
from vllm_zo.slot_fit import resolve_bases

EPS = 2e-2
LOSS_TOLERANCE = 2e-5
GRAD_TOLERANCE = LOSS_TOLERANCE / EPS
STEPS, BATCH, SEED, RATE = 8, 4, 3, 1e-3
LOZO = LoZO(rank=2, interval=3, eps=EPS)
CHOICES = ["so terrible", "great", "neither good nor bad"]

CASES: dict[str, dict[str, Any]] = {
    "bank with one basis": {"method": LOZO, "bases": 1},
    "bank cycling through two bases": {"method": LOZO, "bases": 2},
    "bank with a basis an interval": {"method": LOZO},
    "fold": {"method": LOZO, "update_space": "fold"},
    "factorized MeZO folds every step, its rank that of a slot": {"method": FactorizedMeZO(rank=16, eps=EPS)},
    "three directions in probe waves": {"method": replace(LOZO, queries=3), "bases": 2},
    "three directions in one group": {"method": replace(LOZO, queries=3), "bases": 2, "slots": 6},
    "llama packs qkv and gate_up": {"method": LOZO, "family": "llama"},
    "qwen2": {"method": LOZO, "family": "qwen2", "update_space": "fold"},
    "attention only": {"method": LOZO, "target_modules": "attention"},
    "embeddings": {"method": LOZO, "family": "llama", "target_modules": "embeddings"},
    "LM head": {"method": LOZO, "family": "llama", "target_modules": "lm_head", "bases": 2},
    "embeddings, LM head and layers, all tokens of a text": {
        "method": replace(LOZO, queries=2),
        "family": "llama",
        "target_modules": ".*",
        "objective": LanguageModeling(prompt_field="sentence", completion_field="sentence"),
    },
    "options as full sequences": {"method": LOZO, "objective": replace(SENTIMENT, mode="full")},
    "two-token options": {"method": LOZO, "objective": replace(SENTIMENT, options=(" so terrible", " so great"))},
    "language modelling": {
        "method": LOZO,
        "objective": LanguageModeling(prompt_field="sentence", completion_field="sentence"),
    },
    "two or three choices of the example's own": {
        "method": LOZO,
        "objective": MultipleChoice("{sentence} It was", loss_kind="likelihood"),
        "record": lambda row: row | {"choices": CHOICES[: 2 + len(row["sentence"]) % 2]},
    },
    "a centre and three directions": {
        "method": FZOO(interval=3, eps=EPS, queries=3),
        "bases": 2,
        "slots": 4,
        "rate": 1e-5,
        "grad_tolerance": 3e-1,
    },
    "a population of two pairs, folded every step": {"method": EGGROLL(eps=EPS, queries=2), "grad_tolerance": 5e-4},
    "a population in a bank, in waves": {
        "method": EGGROLL(eps=EPS, queries=2, interval=3),
        "update_space": "bank",
        "grad_tolerance": 5e-4,
    },
    "leave one out": {"method": replace(LOZO, queries=3, estimator=LeaveOneOut()), "bases": 2},
    "Adam across two bases": {"method": replace(LOZO, optimizer=Adam()), "bases": 2, "state_tolerance": 2e-4},
    "momentum through a fold": {"method": replace(LOZO, optimizer=Momentum()), "update_space": "fold"},
    "weight decay of two bases": {"method": replace(LOZO, optimizer=SGD(weight_decay=50.0)), "bases": 2},
    "a diagonal between frozen factors": {"method": TeZO(rank=4, eps=EPS), "rate": 1e-4},
    "orthonormal factors": {
        "method": SubZero(rank=4, interval=3, eps=EPS),
        "bases": 3,
        "rate": 1e-4,
        "grad_tolerance": 5e-3,
    },
    "A is frozen": {"method": LoRAFA(rank=4, eps=EPS, queries=2), "rate": 1e-2},
    "two perturbed factors": {"method": MeZOLoRA(rank=4, eps=EPS), "rate": 1e-2},
    "dense directions, in the base weights": {
        "method": MeZO(eps=EPS, queries=2),
        "rate": 1e-4,
        "grad_tolerance": 3 * GRAD_TOLERANCE,
    },
    "dense directions in packed layers": {"method": MeZO(eps=EPS), "rate": 1e-4, "family": "llama"},
    "two perturbed factors of packed layers": {"method": MeZOLoRA(rank=2, eps=EPS), "rate": 1e-3, "family": "llama"},
    "two micro-batches, a shrinking radius, cut coefficients": {
        "method": LOZO,
        "options": {"micro_batches": 2, "eps_schedule": "linear", "max_coefficient": 0.5},
        "grad_tolerance": 10 * GRAD_TOLERANCE,
    },
    "members prefilled in chunks": {
        "method": LOZO,
        "engine": {"max_num_batched_tokens": 24, "max_num_seqs": 8, "enable_chunked_prefill": True},
    },
    "more members than the engine has sequences": {"method": LOZO, "engine": {"max_num_seqs": 4}},
}


def reference(engines: Engines, case: dict[str, Any], space: str, num_bases: int) -> Any:
    path = engines.model(case.get("family", "opt"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return ReferenceTrainer(
        model,
        case["method"],
        case.get("objective", SENTIMENT),
        job_seed=SEED,
        update_space=space,
        num_bases=num_bases,
        target_modules=case.get("target_modules", "all-linear"),
    )


def by_module(state: AdapterState) -> dict[str, torch.Tensor]:
    """Accumulators by name: vLLM and Hugging Face list the modules of a layer in different orders."""
    parts = state.acc_BN.split(state.coordinates.ranges(state.layout).counts, dim=-1)
    return {m.name: part for m, part in zip(state.layout.modules, parts, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_the_engine_follows_the_reference(engines: Engines, name: str) -> None:
    case = CASES[name]
    slots = case.get("slots", 2)
    llm = engines.get(case.get("family", "opt"), zo_training={"slots": slots}, **case.get("engine", {}))
    rows = [case.get("record", dict)(row) for row in reviews(24, seed=1)]
    rate, grad_tolerance = case.get("rate", RATE), case.get("grad_tolerance", GRAD_TOLERANCE)
    objective = case.get("objective", SENTIMENT)
    options = {k: case[k] for k in ("method", "update_space", "bases", "target_modules") if k in case}
    options |= case.get("options", {})
    run = llm.finetune(
        rows,
        objective=objective,
        learning_rate=rate,
        batch_size=BATCH,
        steps=STEPS,
        seed=SEED,
        progress=False,
        **options,
    )

    num_bases = resolve_bases(case["method"], run.config.space, STEPS, 16, case.get("bases"))
    oracle = reference(engines, case, run.config.space, num_bases)
    tokenizer = AutoTokenizer.from_pretrained(engines.model(case.get("family", "opt")))
    examples = encode_examples(rows, objective, tokenizer, 128, "rows")
    order = BatchOrder(len(examples), run.config.examples_per_step, SEED)
    assert len(run.history) == STEPS
    for step, record in enumerate(run.history):
        batch, eps = [examples[i] for i in order.batch(step)], eps_factor_at(run.config.eps_schedule, step, STEPS)
        losses, coefficients = oracle.step(step, batch, rate, eps, run.config.max_coefficient)
        assert record["loss"] == pytest.approx(losses.mean().item(), abs=LOSS_TOLERANCE), f"step {step}"
        assert record["coefficients"] == pytest.approx(coefficients.tolist(), abs=grad_tolerance), f"step {step}"
    if run.config.space == "bank":
        state = read_seed_log(run.directory / "seeds.log").header.new_state()
        load_snapshot(run.version_file, state)
        # STEPS updates of RATE * coefficient error * |U| (|U| < 6.8)
        tolerance = case.get("state_tolerance", STEPS * rate * grad_tolerance * 7)
        ours, theirs = by_module(state), by_module(oracle.state)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[m], theirs[m], atol=tolerance) for m in ours)
    else:
        llm.restore_base(run)
    assert not scheduler_of(llm).zo.has_work()
