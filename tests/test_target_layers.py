"""Jobs that train the upper layers only: they follow the naive reference, and the layers below run once an example."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams

from tests import tiny
from tests.engines import SENTIMENT, Engines, members_as_requests, reviews, scheduler_of, worker_of
from tests.reference import ReferenceTrainer
from tests.test_concurrent_jobs import losses, start, step
from vllm_zo import ConfigError, LanguageModeling, LoZO, MeZO
from vllm_zo.commands import Alone
from vllm_zo.data import BatchOrder, encode_examples
from vllm_zo.slot_fit import resolve_bases
from vllm_zo.worker.cpu import pruned_forward
from vllm_zo.worker.cpu.row_plan import Below, RowPlan, plan_rows
from vllm_zo.worker.kept_states import KeptStates, Sequence
from vllm_zo.worker.platform import Chunk

LAYERS = 4
LOSS_TOLERANCE = 2e-5
"""Nats: float32 rounding of a 4-layer model."""
EPS, STEPS, BATCH, ROWS, RATE = 2e-2, 9, 4, 16, 1e-3  # more than two epochs
LOZO = LoZO(eps=EPS, interval=4)
Settings = dict[str, Any]


@pytest.fixture(scope="module")
def families(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """The session's engines, with models of four layers."""
    for family, make in (("opt", tiny.make_opt), ("llama", tiny.make_llama)):
        directory = tmp_path_factory.mktemp(family)
        engines.add(f"{family}-{LAYERS}", make(directory, layers=LAYERS))
    return engines


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[RowPlan]:
    """Of every forward with members while the test runs."""
    made: list[RowPlan] = []
    monkeypatch.setattr(pruned_forward, "plan_rows", lambda *a: made.append(plan_rows(*a)) or made[-1])
    return made


def train(llm: Any, **options: Any) -> Any:
    """Run a job that finds nothing kept by an earlier one."""
    worker_of(llm).zo.platform.forget_states()
    return train_on(llm, **options)


def train_on(llm: Any, **options: Any) -> Any:
    settings: Settings = {
        "objective": SENTIMENT, "method": LOZO, "learning_rate": RATE, "batch_size": BATCH, "steps": STEPS,
        "progress": False,
    }  # fmt: skip
    return llm.finetune(options.pop("rows", reviews(ROWS, seed=4)), **(settings | options))


# --- the plan ---------------------------------------------------------------------------------------------------------


def below_of(plan: RowPlan) -> Below:
    assert plan.below is not None
    return plan.below


def sequence_of(chunk: Chunk, layer: int) -> Sequence | None:
    """What may be kept of a chunk at a layer."""
    rows = tuple(chunk.targets) if layer == LAYERS else None
    return Sequence(chunk.owner, layer, tuple(chunk.token_ids), rows) if chunk.whole else None


def test_two_probes_share_the_rows_below_and_a_kept_sequence_has_none_there() -> None:
    def member(state: str, tokens: tuple[int, ...]) -> Chunk:
        return Chunk(len(tokens), state, tokens, (len(tokens) - 1,), whole=True, first_layer=2, owner="job")

    chunks = [member(state, tokens) for state in "+-" for tokens in ((5, 7, 9), (5, 7, 8))]
    plan = plan_rows(chunks, LAYERS)
    assert len(plan.keep_U) == 8 and below_of(plan).rows_B.tolist() == [0, 1, 2, 5]
    assert plan.spread_U.tolist() == [0, 1, 2, 3] * 2 and below_of(plan).loaded_B.all()
    assert below_of(plan).expand_T.tolist() == [0, 1, 2, 0, 1, 3] * 2
    kept = Sequence("job", 2, (5, 7, 9))
    assert {s: rows.tolist() for s, rows in below_of(plan).to_keep.items()} == {
        kept: [0, 1, 2],
        Sequence("job", 2, (5, 7, 8)): [0, 1, 3],
    }
    plan = plan_rows(chunks, LAYERS, {kept}.__contains__)
    assert below_of(plan).rows_B.tolist() == [3, 4, 5] and below_of(plan).kept == ((kept, 0),)
    assert plan.spread_U.tolist() == [3, 4, 5, 0, 1, 2] * 2


def test_behind_the_layers_a_kept_sequence_has_the_rows_that_are_read() -> None:
    def member(tokens: tuple[int, ...], targets: tuple[int, ...]) -> Chunk:
        return Chunk(len(tokens), "as loaded", tokens, targets, whole=True, first_layer=LAYERS, owner="job")

    chunks = [member((5, 7, 9), (2,)), member((5, 7, 8, 4), (1, 3))] * 2
    first, second = Sequence("job", LAYERS, (5, 7, 9), (2,)), Sequence("job", LAYERS, (5, 7, 8, 4), (1, 3))
    plan = plan_rows(chunks, LAYERS)
    assert {s: rows.tolist() for s, rows in below_of(plan).to_keep.items()} == {first: [2], second: [1, 4]}
    plan = plan_rows(chunks, LAYERS, {first, second}.__contains__)
    assert not len(below_of(plan).rows_B) and below_of(plan).kept == ((first, 0), (second, 0))
    assert plan.keep_U.tolist() == [2, 4, 6] and plan.spread_U.tolist() == [0, 1, 2]
    assert plan.expand_T[[2, 4, 6, 9, 11, 13]].tolist() == [0, 1, 2] * 2
    plan = plan_rows([replace(chunks[0], targets=(1, 2)), chunks[1]], LAYERS, {first, second}.__contains__)
    assert len(below_of(plan).rows_B) == 3 and below_of(plan).kept == ((second, 0),), "other rows are read"


def test_rows_below_are_those_of_equal_history_and_serving_rows_are_apart() -> None:
    rng = random.Random(0)
    for first_layers in [(2, 3, 9), (9,)] * 100:
        chunks, kept = [], set()
        for _ in range(rng.randint(1, 9)):
            tokens = tuple(rng.choices((1, 2), k=rng.randint(1, 5)))
            kind = rng.random()
            if kind < 0.2:  # a request
                chunks.append(Chunk(len(tokens)))
                continue
            whole, owner = kind < 0.8, rng.choice(["a", "b"])
            targets = tuple(sorted(rng.sample(range(len(tokens)), rng.randint(1, len(tokens)))))
            first_layer = rng.choice(first_layers)
            chunk = Chunk(
                len(tokens), rng.choice("+-"), tokens, targets, whole=whole, first_layer=first_layer, owner=owner
            )
            chunks.append(chunk)
            if whole and rng.random() < 0.5:
                kept |= {Sequence(owner, 2, tokens), Sequence(owner, LAYERS, tokens, targets)}
        plan = plan_rows(chunks, LAYERS, kept.__contains__)
        members = [c for c in chunks if c.state]
        if not members:
            assert plan.below is None
            continue
        below = below_of(plan)
        assert below.layer == min(LAYERS, *(c.first_layer for c in members))
        # What each row is: a token history of members' base states, or a row of a request.
        history = [
            (() if c.state else (object(),), c.token_ids[: i + 1], c.state is not None)
            for c in chunks
            for i in range(c.rows)
        ]
        entering: list[Any] = [history[t][:2] for t in below.rows_B.tolist()]
        assert [history[t][2] for t in below.rows_B.tolist()] == below.loaded_B.tolist()
        for sequence, first in below.kept:
            assert sequence in kept and sequence.layer == below.layer
            rows = range(len(sequence.token_ids)) if sequence.rows is None else sequence.rows
            entering += [((), sequence.token_ids[: i + 1]) for i in rows[first:]]
        assert len(entering) == len(plan.first_D)
        entered = [entering[plan.spread_U[u]] for u in plan.expand_T.tolist()]
        matters = [
            bool(i in c.targets or sequence_of(c, below.layer) not in kept) for c in chunks for i in range(c.rows)
        ]
        assert list(compress(entered, matters)) == [h[:2] for h in compress(history, matters)]
        assert below.layer == LAYERS or entered == [h[:2] for h in history]
        assert [plan.spread_U[u] for u in plan.first_D] == list(range(len(plan.first_D)))
        for sequence, rows in below.to_keep.items():
            assert sequence not in kept
            places = range(len(rows)) if sequence.rows is None else sequence.rows
            assert [entering[b] for b in rows] == [((), sequence.token_ids[: i + 1]) for i in places]
        if below.whole is not None:
            assert sorted(set(below.whole.buckets.gather_P.tolist())) == list(range(len(below.rows_B)))


def test_a_step_whose_jobs_train_the_first_layer_has_nothing_below() -> None:
    chunk = Chunk(2, "+", (5, 7), (1,), whole=True, first_layer=0, owner="job")
    upper = Chunk(2, "+", (5, 7), (1,), whole=True, first_layer=2, owner="other")
    assert plan_rows([chunk, upper], LAYERS).below is None
    assert plan_rows([upper]).below is None, "a model whose layers are unknown"


def keep(kept: KeptStates, *sequences: Sequence) -> None:
    for sequence in sequences:
        kept.keep(sequence, {0: torch.zeros(30)}, torch.arange(10))


def test_states_beyond_the_budget_are_not_kept_and_those_of_ended_jobs_go_when_room_is_needed() -> None:
    kept = KeptStates(100)
    one, two, three, four = (Sequence(owner, 2, (i,)) for i, owner in enumerate("aabb"))
    keep(kept, one, two, three)
    assert kept.claim(one) and kept.claim(two) and not kept.claim(three) and kept.bytes == 80
    kept.ended("a")
    assert (len(kept), kept.used, kept.bytes) == (2, 0, 80)
    keep(kept, three)
    assert not kept.claim(one) and kept.claim(three) and kept.bytes == 80, "the one that was unused first"
    keep(kept, four)
    assert not kept.claim(two) and kept.used == 2 and kept.bytes == 80


def test_states_are_the_next_jobs_too_and_stay_while_one_of_them_runs() -> None:
    kept = KeptStates(50)
    first, second, other = Sequence("a", 2, (5,)), Sequence("b", 2, (5,)), Sequence("b", 2, (6,))
    keep(kept, first)
    assert kept.claim(second) and not kept.claim(Sequence("b", 3, (5,))), "of another layer"
    kept.ended("a")
    keep(kept, other)
    assert kept.claim(second) and not kept.claim(other), "b uses the first"
    kept.ended("b")
    keep(kept, other)
    assert kept.claim(other) and not kept.claim(second)
    kept.clear()
    assert len(kept) == kept.used == kept.bytes == 0


# --- the engine -------------------------------------------------------------------------------------------------------

CASES: dict[str, Settings] = {
    "upper half": {"target_layers": "2:"},
    "packed layers, upper half": {"target_layers": "2:", "family": "llama"},
    "the last layer": {"target_layers": "last", "family": "llama"},
    "layers with gaps": {"target_layers": "1,3"},
    "MLPs of the upper layers": {"target_layers": "-3:", "target_modules": "mlp", "family": "llama"},
    "upper half and LM head": {
        "target_layers": "2:", "target_modules": r".*(_proj|lm_head)", "family": "llama", "bases": 2,
    },
    "LM head alone": {"target_modules": "lm_head", "family": "llama", "bases": 2},
    "LM head alone, two waves of one-sided probes": {
        "target_modules": "lm_head", "family": "llama", "bases": 2,
        "method": LoZO(queries=3, estimator="one-sided", eps=EPS, interval=4),
    },
    "LM head alone, texts": {
        "target_modules": "lm_head", "family": "llama", "bases": 2,
        "objective": LanguageModeling(prompt_field="sentence", completion_field="sentence"),
    },
    "embeddings too: nothing is below": {"target_layers": "2:", "target_modules": ".*", "family": "llama", "bases": 2},
    "fold": {"target_layers": "2:", "update_space": "fold"},
    "dense directions in the base weights": {"target_layers": "2:", "method": MeZO(eps=EPS), "rate": 1e-4},
    "members in chunks": {
        "target_layers": "2:",
        "engine": {"max_num_batched_tokens": 24, "max_num_seqs": 8, "enable_chunked_prefill": True},
    },
    "teacher forcing": {
        "target_layers": "2:",
        "objective": LanguageModeling(prompt_field="sentence", completion_field="sentence"),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_upper_layers_follow_the_reference_and_the_engine_that_leaves_nothing_out(
    families: Engines, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    family = f"{case.get('family', 'opt')}-{LAYERS}"
    llm = families.get(family, **case.get("engine", {}))
    scope = {k: case[k] for k in ("target_layers", "target_modules") if k in case}
    options = scope | {k: case[k] for k in ("method", "objective", "update_space", "bases") if k in case}
    rate = case.get("rate", RATE)
    run = train(llm, learning_rate=rate, **options)
    if run.config.space == "fold":
        llm.restore_base(run)

    method, objective = case.get("method", LOZO), case.get("objective", SENTIMENT)
    bases = resolve_bases(method, run.config.space, STEPS, 16, case.get("bases"))
    model = AutoModelForCausalLM.from_pretrained(families.model(family), dtype=torch.float32)
    oracle = ReferenceTrainer(
        model, method, objective, job_seed=0, update_space=run.config.space, num_bases=bases, **scope
    )
    tokenizer = AutoTokenizer.from_pretrained(families.model(family))
    examples = encode_examples(reviews(ROWS, seed=4), objective, tokenizer, 128, "rows")
    order = BatchOrder(ROWS, BATCH, 0)
    for number, record in enumerate(run.history):
        expected, _ = oracle.step(number, [examples[i] for i in order.batch(number)], rate)
        assert record["loss"] == pytest.approx(expected.mean().item(), abs=LOSS_TOLERANCE), f"step {number}"

    monkeypatch.setattr(worker_of(llm).zo.platform.rows, "refused", "to compare")
    monkeypatch.setattr(worker_of(llm).zo.platform.rows, "not_alone", "to compare")
    whole = train(llm, learning_rate=rate, **options)
    if run.config.space == "fold":
        llm.restore_base(whole)
    assert losses(run) == pytest.approx(losses(whole), abs=LOSS_TOLERANCE)


@pytest.fixture(params=["alone", "as requests"])
def road(request: pytest.FixtureRequest, families: Engines) -> Iterator[tuple[Any, str]]:
    """An engine that runs members in a forward of its own, or as requests of vLLM's."""
    llm = families.get(f"llama-{LAYERS}")
    if request.param == "alone":
        yield llm, request.param
    else:
        with members_as_requests(llm):
            yield llm, request.param


SCOPES: list[Settings] = [{"target_layers": "2:"}, {"target_modules": "lm_head", "bases": 1}]


@pytest.mark.parametrize("scope", SCOPES, ids=["upper half", "LM head"])
def test_below_the_first_trained_layer_an_example_is_computed_once_in_all(
    road: tuple[Any, str], plans: list[RowPlan], scope: Settings
) -> None:
    llm, _ = road
    run = train(llm, **scope)
    assert len(plans) == STEPS
    computed = [len(below_of(plan).rows_B) for plan in plans]
    epoch = ROWS // BATCH
    under_both_signs = [record["tokens"] for record in run.history]
    tokens = [after - before for before, after in pairwise([0, *under_both_signs])]
    asked = [len(plan.expand_T) for plan in plans]
    assert asked == ([count // 2 for count in tokens] if "target_modules" in scope else tokens), (
        "a head's job asks once"
    )
    for count, rows in zip(tokens[:epoch], computed, strict=False):
        assert 0 < rows <= count / 2, "once for both signs"
    assert computed[epoch:] == [0] * (STEPS - epoch), "kept from the first epoch on"
    assert not worker_of(llm).zo.platform.rows.kept.used, "the job has ended"
    assert [record["step"] for record in run.history] == [*range(1, STEPS + 1)]


def test_a_job_of_the_lm_head_runs_no_layer_once_all_is_kept(
    families: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = families.get(f"llama-{LAYERS}")
    model, calls = worker_of(llm).model_runner.model, 0
    forward = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    train(llm, target_modules="lm_head", bases=1)
    assert calls == ROWS // BATCH, "once a step in the first epoch"


def test_the_next_job_begins_with_what_the_last_one_kept(families: Engines, plans: list[RowPlan]) -> None:
    llm = families.get(f"llama-{LAYERS}")
    first = losses(train(llm, target_layers="2:", seed=1))
    other = losses(train(llm, target_layers="2:", seed=2))
    plans.clear()
    assert losses(train_on(llm, target_layers="2:", seed=1)) == pytest.approx(first, abs=LOSS_TOLERANCE) != other
    assert len(plans) == STEPS and not any(len(below_of(plan).rows_B) for plan in plans)


def test_a_job_that_writes_the_base_weights_drops_what_was_kept(families: Engines) -> None:
    llm = families.get(f"opt-{LAYERS}")
    kept = worker_of(llm).zo.platform.rows.kept
    train(llm, target_layers="last")
    assert len(kept)
    folded = train_on(llm, target_layers="2:", update_space="fold", learning_rate=0.1)
    assert not len(kept), "what was kept before the first fold, and by the job itself"
    llm.restore_base(folded)
    train_on(llm, target_layers="last")
    assert len(kept)


@pytest.mark.parametrize("scope", SCOPES, ids=["upper half", "LM head"])
def test_what_is_kept_and_what_is_computed_mix_in_a_step(
    road: tuple[Any, str], plans: list[RowPlan], monkeypatch: pytest.MonkeyPatch, scope: Settings
) -> None:
    llm, _ = road
    kept = worker_of(llm).zo.platform.rows.kept
    everything = losses(train(llm, **scope))
    half = kept.bytes // 2
    monkeypatch.setattr(kept, "limit_bytes", 0)
    plans.clear()
    assert losses(train(llm, **scope)) == pytest.approx(everything, abs=LOSS_TOLERANCE)
    assert all(len(below_of(plan).rows_B) and not below_of(plan).kept for plan in plans)
    monkeypatch.setattr(kept, "limit_bytes", half)
    plans.clear()
    assert losses(train(llm, **scope)) == pytest.approx(everything, abs=LOSS_TOLERANCE)
    assert any(len(below_of(plan).rows_B) and below_of(plan).kept for plan in plans), "or this test shows nothing"


@pytest.mark.parametrize("scope", SCOPES, ids=["upper half", "LM head"])
def test_beside_traffic_the_run_and_the_answers_are_those_of_each_alone(
    families: Engines, plans: list[RowPlan], scope: Settings
) -> None:
    llm = families.get(f"llama-{LAYERS}")
    tuned = train(llm, learning_rate=5e-2)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=1, prompt_logprobs=0)
    prompts = ["one long string of cliches", "the story is dull and the acting is terrible", "funny , warm"]
    adapters = [None, tuned.lora_request, None]
    alone = llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
    quiet = losses(train(llm, steps=24, **scope))
    plans.clear()
    job = start(llm, reviews(ROWS, seed=4), method=LOZO, learning_rate=RATE, steps=24, **scope)
    step(llm, 7)  # further than an epoch: what follows has kept rows beside serving rows
    assert any(below_of(plan).kept for plan in plans)
    plans.clear()
    beside = llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
    mixed = [plan for plan in plans if plan.below and plan.below.kept and not plan.below.loaded_B.all()]
    assert mixed, "or this test shows nothing"
    while scheduler_of(llm).zo.has_work():
        step(llm, 1)
    job.poll()
    assert losses(job) == pytest.approx(quiet, abs=LOSS_TOLERANCE)
    for one, other in zip(alone, beside, strict=True):
        assert other.outputs[0].token_ids == one.outputs[0].token_ids
        ours, theirs = (
            [next(iter(p.values())).logprob for p in [*o.prompt_logprobs[1:], *o.outputs[0].logprobs]]
            for o in (one, other)
        )
        assert theirs == pytest.approx(ours, abs=LOSS_TOLERANCE)


def test_jobs_that_train_different_layers_share_a_step(families: Engines) -> None:
    llm = families.get(f"llama-{LAYERS}", zo_training={"concurrent_jobs": 2})
    scopes: list[Settings] = [
        {"target_layers": "2:", "seed": 1},
        {"target_layers": "last", "seed": 2},
        {"target_modules": "lm_head", "bases": 1, "seed": 3},
        {"seed": 4},
    ]
    alone = [losses(train(llm, **scope)) for scope in scopes]
    for pair in ((0, 1), (0, 2), (1, 2), (0, 3)):
        together = [
            start(llm, reviews(ROWS, seed=4), method=LOZO, learning_rate=RATE, steps=STEPS, **scopes[i]) for i in pair
        ]
        while scheduler_of(llm).zo.has_work():
            step(llm, 1)
        for run, i in zip(together, pair, strict=True):
            run.poll()
            assert losses(run) == pytest.approx(alone[i], abs=LOSS_TOLERANCE), pair
    assert not worker_of(llm).zo.platform.rows.kept.used


def test_the_scheduler_knows_what_each_layer_costs(families: Engines) -> None:
    """It paces forwards that stop between layers, and counts a layer by its rows."""
    llm = families.get(f"llama-{LAYERS}")
    zo = scheduler_of(llm).zo
    of_the_head: Settings = {"target_modules": "lm_head", "bases": 1}
    scopes: list[tuple[Settings, list[int]]] = [
        ({}, [1, 1, 1, 1]), ({"target_layers": "2:"}, [0, 0, 1, 1]), ({"target_layers": "last"}, [0, 0, 0, 1]),
        (of_the_head, [0, 0, 0, 1]), ({}, [1, 1, 1, 1]),
    ]  # fmt: skip
    for scope, costs in scopes:
        train(llm, **scope)  # more than an epoch: the states of every example are kept
        assert [rows / max(zo.layer_rows) for rows in zo.layer_rows] == costs
    start(llm, reviews(ROWS, seed=4), method=LOZO, learning_rate=RATE, steps=50, target_layers="2:")
    step(llm, 2)  # nothing is kept yet: layers below run once for both probes
    below, above = zo.layer_rows[0], zo.layer_rows[-1]
    assert zo.layer_rows == (below, below, above, above) and 0 < below < above
    for job_id in list(zo.queue.unfinished):
        zo.finish_early(job_id, cancel=True)
    while scheduler_of(llm).has_requests():
        step(llm, 1)


@pytest.fixture
def stops(families: Engines, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """(layers that it was to stop after, layers after which it stopped), of each forward of members alone that stops.
    Each goes on by a random number of layers, those without rows among them."""
    llm = families.get(f"llama-{LAYERS}")
    trainer, controller = worker_of(llm).zo, scheduler_of(llm).zo
    rng, seen, limits = random.Random(0), list[tuple[int, int]](), [0]
    go_on, run_layers = trainer.go_on, controller.run_layers

    def spy(*args: Any) -> None:
        go_on(*args)
        if trainer._results.stopped_at is not None:
            seen.append((limits[0], trainer._results.stopped_at))

    def at_most(alone: Alone) -> None:
        layers = rng.randint(1, len(controller.forward.rows) - controller.forward.reached)
        limits[0] = controller.forward.reached + layers
        run_layers(replace(alone, layers=layers))

    monkeypatch.setattr(trainer, "go_on", spy)
    monkeypatch.setattr(controller, "run_layers", at_most)
    yield seen


@pytest.mark.parametrize("limit_bytes", [None, 50_000, 0], ids=["all kept", "some kept", "none kept"])
@pytest.mark.parametrize("scope", [{"target_layers": "1:"}, *SCOPES], ids=["all but one", "upper half", "LM head"])
def test_a_forward_that_stops_goes_on_with_its_own_states(
    families: Engines, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, scope: Settings,
    limit_bytes: int | None,
) -> None:  # fmt: skip
    llm = families.get(f"llama-{LAYERS}")
    if limit_bytes is not None:
        monkeypatch.setattr(worker_of(llm).zo.platform.rows.kept, "limit_bytes", limit_bytes)
    usual = losses(train(llm, **scope))
    stops = request.getfixturevalue("stops")
    assert losses(train(llm, **scope)) == usual
    assert stops and all(layers == told for told, layers in stops)


def test_kept_states_do_not_outlive_the_weights_that_made_them(families: Engines) -> None:
    """vLLM reloads the weights of an engine in place; it then tells its LoRA manager to forget all adapters."""
    llm = families.get(f"llama-{LAYERS}")
    start(llm, reviews(ROWS, seed=4), method=LOZO, learning_rate=RATE, steps=50, target_layers="2:")
    step(llm, 5)
    kept = worker_of(llm).zo.platform.rows.kept
    assert len(kept) and kept.bytes
    worker_of(llm).model_runner.lora_manager.remove_all_adapters()
    assert not len(kept) and not kept.bytes
    for job_id in list(scheduler_of(llm).zo.queue.unfinished):
        scheduler_of(llm).zo.finish_early(job_id, cancel=True)
    while scheduler_of(llm).has_requests():
        step(llm, 1)


def test_evaluations_keep_states_too_and_measure_the_same(families: Engines, plans: list[RowPlan]) -> None:
    llm = families.get(f"opt-{LAYERS}")
    options: Settings = {"target_layers": "top-half", "validation": reviews(12, seed=9), "eval_interval": 3}
    ours = train(llm, **options)
    assert any(not len(below_of(plan).rows_B) for plan in plans)
    rows = worker_of(llm).zo.platform.rows
    decoder, rows.decoder = rows.decoder, None
    try:
        plans.clear()
        theirs = train(llm, **options)
    finally:
        rows.decoder = decoder
    assert all(plan.below is None for plan in plans)
    assert ours.metrics == pytest.approx(theirs.metrics, abs=LOSS_TOLERANCE)
    assert llm.evaluate(reviews(12, seed=9), run=ours)["loss"] == pytest.approx(ours.metrics["loss"], abs=1e-4)


def test_layers_that_the_model_lacks_are_refused_before_the_job_is_made(families: Engines, tmp_path: Path) -> None:
    llm = families.get(f"opt-{LAYERS}")
    with pytest.raises(ConfigError, match="target_layers='4:': the model has 4 layers, 0 to 3; this selects none"):
        train(llm, target_layers="4:", output_dir=str(tmp_path / "job"))
    assert not (tmp_path / "job").exists()
