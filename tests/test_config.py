"""Options: defaults, ranges, what an error says, round trips, and how the update space is resolved."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
from collections.abc import Iterable
from typing import Any

import numpy
import pytest

from vllm_zo.config import JobConfig, ZOTrainingConfig
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.records import evaluations_since_best
from vllm_zo.methods import METHODS, SGD, Adam, FactorizedMeZO, LeaveOneOut, LoZO, Method, MeZOLoRA, TeZO
from vllm_zo.methods.layers import select_layers
from vllm_zo.methods.spaces import SPACES, basis_of, check_space, equals_published, num_intervals
from vllm_zo.methods.targets import select_modules
from vllm_zo.objectives import Classification
from vllm_zo.slot_fit import describe_space, resolve_bases

OBJECTIVE = Classification("{sentence} It was", [" terrible", " great"])  # type: ignore[arg-type]  # lists are accepted


def job(**options: Any) -> JobConfig:
    return JobConfig.from_options({"objective": OBJECTIVE} | options)


# --- engine options ---------------------------------------------------------------------------------------------------


def test_zo_training_accepts_true_a_dictionary_or_itself_and_false_means_none() -> None:
    assert ZOTrainingConfig.from_user(True) == ZOTrainingConfig()
    assert ZOTrainingConfig.from_user(False) is None
    config = ZOTrainingConfig.from_user({"slots": 8, "slot_rank": 32, "token_budget": 512, "state_dir": "jobs"})
    assert config == ZOTrainingConfig(slots=8, slot_rank=32, token_budget=512, state_dir="jobs")
    assert ZOTrainingConfig.from_user(config) is config  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slot": 4}, r"unknown zo_training option 'slot': did you mean 'slots'\?"),
        ({"slots": 1}, r"zo_training\.slots=1: expected an integer >= 2; a pair of probes needs 2"),
        ({"slots": "two"}, r"zo_training\.slots='two': expected an integer"),
        ({"slot_rank": 24}, r"zo_training\.slot_rank=24: expected one of 1, 8, 16, 32"),
        ({"slot_rank": True}, r"zo_training\.slot_rank=True: expected one of"),
        ({"slot_rank": [16]}, r"zo_training\.slot_rank=\[16\]: expected one of"),
        ({"token_budget": 0}, r"zo_training\.token_budget=0: expected an integer >= 1; None sets no limit"),
        ({"state_dir": ""}, r"zo_training\.state_dir='': expected a directory"),
        ("yes", r"zo_training='yes': expected True, False or a dictionary of options"),
    ],
)
def test_a_bad_engine_option_is_named_with_value_and_fix(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ZOTrainingConfig.from_user(options)


# --- job options ------------------------------------------------------------------------------------------------------


def test_a_job_needs_nothing_but_an_objective() -> None:
    config = job()
    assert config.method == LoZO()
    assert (config.space, config.learning_rate, config.batch_size) == ("bank", "auto", 16)


def test_a_method_may_be_given_as_object_name_or_dictionary() -> None:
    expected = LoZO(rank=4)
    assert job(method=expected).method == job(method={"name": "lozo", "rank": 4}).method == expected
    assert job(method="factorized-mezo").method == FactorizedMeZO()


def test_the_update_space_defaults_to_the_first_of_the_method() -> None:
    assert job(method=FactorizedMeZO()).space == "fold"
    assert job(update_space="fold").space == "fold"


def test_a_learning_rate_of_zero_and_zero_steps_are_allowed() -> None:
    config = job(learning_rate=0, steps=0)
    assert (config.learning_rate, config.steps) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learningrate": 1e-6}, r"unknown job option 'learningrate': did you mean 'learning_rate'\?"),
        ({"method": "lozoo"}, r"unknown method 'lozoo': did you mean 'lozo'\?"),
        ({"method": {"name": "lozo", "rnk": 2}}, r"unknown setting of method lozo 'rnk': did you mean 'rank'\?"),
        ({"method": {"rank": 2}}, r"method\.name=None: expected one of lozo, "),
        ({"method": 3}, r"method=3: expected one of lozo, "),
        ({"method": LoZO}, r"method=<class .*LoZO'>: expected one of lozo, "),
        ({"objective": 3}, r"objective=3: expected one of classification, "),
        ({"objective": Classification}, r"objective=<class .*: expected one of classification, "),
        ({"objective": {"name": "clasification"}}, r"unknown objective 'clasification': did you mean"),
        ({"objective": {"template": "{a}"}}, r"objective\.name=None: expected one of classification, "),
        ({"objective": {"name": "classification", "template": "{a}"}}, r"objective\.options is missing"),
        ({"objective": {"name": "classification", "templat": "{a}"}}, r"'templat': did you mean 'template'\?"),
        ({"learning_rate": -1e-7}, r"learning_rate=-1e-07: expected a number >= 0"),
        ({"learning_rate": float("inf")}, r"learning_rate=inf: expected a number >= 0"),
        ({"learning_rate": "quick"}, r"learning_rate='quick': expected a number >= 0.*'auto' finds one"),
        ({"learning_rate": True}, r"learning_rate=True: expected a number >= 0"),
        ({"steps": "1.5"}, r"steps=1\.5: expected an integer >= 0"),
        ({"steps": 4.0}, r"steps=4\.0: expected an integer >= 0"),
        ({"learning_rate_multiplier": 0}, r"learning_rate_multiplier=0: expected a number > 0"),
        ({"lr_schedule": "cosin"}, r"unknown lr_schedule 'cosin': did you mean 'cosine'\?"),
        ({"warmup_steps": 11, "steps": 10}, r"warmup_steps=11: expected an integer from 0 to 10; warm-up is part of"),
        ({"batch_size": 0}, r"batch_size=0: expected an integer >= 1"),
        ({"steps": 1e4}, r"steps=10000\.0: expected an integer >= 0"),
        ({"seed": -1}, r"seed=-1: expected an integer from 0 to"),
        ({"update_space": "banc"}, r"unknown update_space 'banc': did you mean 'bank'\?"),
        ({"method": "factorized-mezo", "update_space": "bank"}, r"update_space='bank': factorized-mezo cannot run"),
        ({"bases": 0}, r"bases=0: expected an integer >= 1"),
        ({"bases": 2, "update_space": "fold"}, r"bases=2: update_space='fold' keeps one basis"),
        ({"target_modules": "(q_proj"}, r"target_modules='\(q_proj': not a regular expression"),
        (
            {"target_modules": ["q_proj"]},
            r"target_modules=\['q_proj'\]: expected one of all-linear, attention, mlp, emb",
        ),
        ({"target_modules": "embeddings", "update_space": "fold"}, r"'embeddings': update_space='fold' writes linear"),
        ({"target_modules": "lm_head", "method": "factorized-mezo"}, r"'lm_head': update_space='fold' writes linear"),
        ({"target_layers": "top"}, r"target_layers='top': expected layers such as '20:', '-10:'"),
        ({"target_layers": "3-5"}, r"target_layers='3-5': expected layers such as '20:'"),
        ({"target_layers": 20}, r"target_layers=20: expected layers such as '20:'"),
        ({"target_layers": ""}, r"target_layers='': expected layers such as '20:'"),
        ({"target_layers": "1," * 900}, r"target_layers='1,1,.*: expected layers such as '20:'"),
        (
            {"target_layers": "2:", "target_modules": "lm_head"},
            r"target_layers='2:': target_modules='lm_head' is in no layer; drop one",
        ),
        ({"on_long": "cut"}, r"unknown on_long 'cut'"),
        ({"patience": 0}, r"patience=0: expected an integer >= 1; None never stops a run early"),
        ({"micro_batches": 0}, r"micro_batches=0: expected an integer >= 1"),
        ({"eps_schedule": "linar"}, r"unknown eps_schedule 'linar': did you mean 'linear'\?"),
        ({"max_coefficient": 0.0}, r"max_coefficient=0\.0: expected a number > 0; None sets no limit"),
        ({"max_seconds": 0}, r"max_seconds=0: expected a number > 0; None sets no limit"),
        ({"max_seconds": "soon"}, r"max_seconds='soon': expected a number > 0"),
        ({"eval_interval": 0}, r"eval_interval=0: expected an integer >= 1"),
        ({"eval_examples": 0}, r"eval_examples=0: expected an integer >= 1; None evaluates on all"),
        ({"checkpoint_interval": 0}, r"checkpoint_interval=0: expected an integer >= 1"),
        ({"output_dir": 3}, r"output_dir=3: expected a directory as a non-empty string, or None"),
        ({"keep_best": 1}, r"keep_best=1: expected True or False"),
        ({"divergence_factor": 0.5}, r"divergence_factor=0\.5: expected a number >= 1; None turns the guard off"),
    ],
)
def test_a_bad_job_option_is_named_with_value_and_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(**options)


def test_a_run_that_could_never_run_out_of_patience_is_refused() -> None:
    job(patience=2, eval_interval=5).check_evaluates(True)
    job().check_evaluates(False)
    with pytest.raises(ConfigError, match="patience=2: counts evaluations, and needs validation data"):
        job(patience=2, eval_interval=5).check_evaluates(False)
    with pytest.raises(ConfigError, match="patience=2: counts evaluations, and needs eval_interval, the steps"):
        job(patience=2).check_evaluates(True)


@pytest.mark.parametrize(
    ("losses", "since"),
    [([], 0), ([2.0], 0), ([2.0, 1.0], 0), ([1.0, 2.0], 1), ([1.0, 1.0, 1.0], 2), ([3.0, 1.0, math.nan, 2.0], 2),
     ([math.nan, math.inf], 2), ([math.nan, 1.0], 0)],
)  # fmt: skip
def test_evaluations_that_are_no_better_are_counted_from_the_best(losses: list[float], since: int) -> None:
    evaluations: Any = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]
    assert evaluations_since_best(evaluations) == since


def test_a_job_without_an_objective_says_what_one_looks_like() -> None:
    with pytest.raises(ConfigError, match="objective is missing: expected e.g. Classification"):
        JobConfig.from_options({"steps": 10})


CONFIGS = {
    "defaults": {},
    "everything set": {
        "method": LoZO(rank=4, interval=10, eps=1e-2, queries=3),
        "learning_rate": 3e-6,
        "lr_schedule": "cosine",
        "warmup_steps": 5,
        "batch_size": 8,
        "steps": 77,
        "seed": 2**63 - 1,
        "update_space": "bank",
        "bases": 3,
        "target_modules": r".*\.(q_proj|v_proj)",
        "target_layers": "0,-2:",
        "eval_interval": 10,
        "eval_examples": 100,
        "checkpoint_interval": 50,
        "output_dir": "adapter",
        "keep_best": False,
        "publish_interval": 7,
        "divergence_factor": None,
        "max_seconds": 600,
    },
    "another method": {"method": FactorizedMeZO(rank=8)},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_a_job_survives_json_and_pickling(options: dict[str, Any]) -> None:
    config = job(**options)
    again = JobConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert pickle.loads(pickle.dumps(config)) == config


OTHER_VALUES: dict[str, Any] = {
    "objective": Classification("{sentence} Was it", (" terrible", " great")),
    "method": LoZO(rank=3),
    "on_long": "drop",
    "patience": 3,
    "continual": True,
    "buffer_rows": 128,
    "buffer_policy": "mixed",
    "max_drift": 5.0,
    "keep_versions": 3,
    "learning_rate": 1e-6,
    "learning_rate_multiplier": 2.0,
    "lr_schedule": "linear",
    "warmup_steps": 1,
    "batch_size": 17,
    "micro_batches": 2,
    "eps_schedule": "cosine",
    "max_coefficient": 10.0,
    "deadline": 2.0,
    "shards": 4,
    "steps": 1001,
    "seed": 1,
    "update_space": "fold",
    "bases": 2,
    "target_modules": "mlp",
    "target_layers": "2:",
    "eval_interval": 5,
    "eval_examples": 5,
    "checkpoint_interval": 5,
    "output_dir": "elsewhere",
    "keep_best": False,
    "publish_interval": 7,
    "divergence_factor": 9.0,
    "max_seconds": 60.0,
}


MEASURED_OR_KEPT = (
    "eval_interval",
    "eval_examples",
    "checkpoint_interval",
    "publish_interval",
    "output_dir",
    "keep_best",
    "divergence_factor",
    "max_seconds",
    "patience",
    "max_drift",
    "keep_versions",
)


def test_every_job_option_has_another_value_in_the_table_above() -> None:
    assert set(OTHER_VALUES) == {f.name for f in dataclasses.fields(JobConfig)}


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_resuming_is_refused_when_the_trajectory_would_differ_and_only_then(field: str) -> None:
    started, resumed = job(), job(**{field: OTHER_VALUES[field]})
    if field in MEASURED_OR_KEPT:
        resumed.check_resumes(started)
    else:
        with pytest.raises(ConfigError, match=rf"cannot resume with another configuration: {field}=.*started with"):
            resumed.check_resumes(started)


def test_resuming_does_not_see_how_a_value_was_spelt() -> None:
    job(learning_rate=0).check_resumes(job(learning_rate=0.0))
    job(update_space="bank").check_resumes(job())


# --- update spaces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method() for method in METHODS.values()], ids=lambda m: m.name)
@pytest.mark.parametrize("space", SPACES)
def test_a_method_is_refused_with_its_reason_in_a_space_it_does_not_run_in(method: Method, space: str) -> None:
    if space in method.update_spaces:
        check_space(method, space)
    else:
        other = {"bank": "fold", "fold": "bank"}[space]
        message = f"{method.name} cannot run in it .{method.refusals[space]}.; set update_space='{other}'"
        with pytest.raises(ConfigError, match=message):
            check_space(method, space)


def test_what_has_one_basis_for_the_whole_run_refuses_more() -> None:
    with pytest.raises(ConfigError, match=r"bases=2: tezo keeps one basis for the whole run; drop bases"):
        resolve_bases(TeZO(), "bank", 100, 64, 2)
    assert resolve_bases(TeZO(), "bank", 100, 16) == resolve_bases(MeZOLoRA(), "bank", 100, 16) == 1
    with pytest.raises(ConfigError, match=r"mezo-lora.rank=8 and slot_rank=16: .* 24 in all; set rank <= 5, or "):
        resolve_bases(MeZOLoRA(rank=8), "bank", 100, 16)


def test_parts_of_a_method_go_through_json_by_name() -> None:
    config = job(
        method={"name": "lozo", "estimator": "rloo", "queries": 2, "optimizer": {"name": "adam", "beta1": 0.5}}
    )
    assert config.method == LoZO(estimator=LeaveOneOut(), queries=2, optimizer=Adam(beta1=0.5))
    assert JobConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert set(job().to_json()["method"]) == {"name", "rank", "interval", "eps", "queries"}, "parts only where chosen"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "lozo", "optimizer": "adm"}, r"unknown optimizer 'adm': did you mean 'adam'\?"),
        (
            {"name": "lozo", "optimizer": {"name": "adam", "beta": 1}},
            r"unknown setting of optimizer adam 'beta': did",
        ),
        ({"name": "lozo", "optimizer": {"name": "adam", "beta1": 1}}, r"adam.beta1=1: expected a number >= 0 and < 1"),
        ({"name": "lozo", "optimizer": 3}, r"optimizer=3: expected one of sgd, momentum, adam"),
        ({"name": "lozo", "estimator": "rlo"}, r"unknown estimator 'rlo': did you mean 'rloo'\?"),
        (
            {"name": "lozo", "estimator": "rloo"},
            r"lozo.queries=1: expected an integer >= 2; rloo compares",
        ),
        (
            {"name": "tezo", "optimizer": "muon"},
            r"optimizer='muon' makes a step from matrices, and tezo",
        ),
        (
            {"name": "kerzoo", "estimator": {"name": "kerzoo", "constant": 0}},
            r"kerzoo.constant=0: expected a number",
        ),
        ({"name": "eggroll", "queries": 513}, r"eggroll.queries=513: expected an integer from 1 to 512; every pair"),
        ({"name": "mezo-lora", "alpha": -1.0}, r"mezo-lora.alpha=-1.0: expected a number > 0; MeZO uses 16"),
    ],
)
def test_a_bad_part_is_named_with_value_and_fix(method: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(method=method)


def test_weight_decay_is_refused_where_it_is_not_defined() -> None:
    method = LoZO(optimizer=SGD(weight_decay=0.1))
    assert job(method=method).space == "bank"
    with pytest.raises(ConfigError, match=r"sgd.weight_decay=0.1: not defined in update_space='fold', where W itself"):
        job(method=method, update_space="fold")


def test_numbers_that_yaml_and_forms_bring_as_text_are_numbers() -> None:
    numbers = {"learning_rate": "1e-5", "steps": "1e3", "batch_size": " 8 ", "bases": "2", "divergence_factor": "4"}
    method = {"name": "lozo", "eps": "1e-3", "rank": "4", "optimizer": {"name": "adam", "beta1": ".8"}}
    config = job(**numbers, method=method)
    assert (config.learning_rate, config.steps, config.batch_size, config.bases) == (1e-5, 1000, 8, 2)
    assert config.method == LoZO(eps=1e-3, rank=4, optimizer=Adam(beta1=0.8))
    assert config == job(
        learning_rate=1e-5, steps=1000, batch_size=8, bases=2, divergence_factor=4.0, method=config.method
    )
    assert job(learning_rate=numpy.float32(0.5), steps=numpy.int64(3)) == job(learning_rate=0.5, steps=3)
    assert ZOTrainingConfig(slots="4", slot_rank="32") == ZOTrainingConfig(slots=4, slot_rank=32)  # type: ignore[arg-type]


def test_a_method_that_the_engine_could_not_find_is_refused() -> None:
    class Other(LoZO):
        pass

    with pytest.raises(ConfigError, match=r"'lozo' is not .*Other. Declare the class in the entry point group"):
        job(method=Other())


@pytest.mark.parametrize(
    ("steps", "slot_rank", "requested", "expected"),
    [
        (1000, 16, None, 7),  # 20 intervals; 16 / 2 = 8 blocks, one of which is the probe's
        (1000, 64, None, 20),  # room for 31, but only 20 intervals
        (151, 64, None, 4),  # a started interval counts
        (150, 64, None, 3),
        (1, 64, None, 1),
        (0, 64, None, 1),
        (1000, 16, 1, 1),
        (1000, 16, 7, 7),
    ],
)
def test_the_bank_keeps_a_basis_an_interval_as_far_as_the_slot_rank_goes(
    steps: int, slot_rank: int, requested: int | None, expected: int
) -> None:
    assert resolve_bases(LoZO(rank=2, interval=50), "bank", steps, slot_rank, requested) == expected


def test_fold_keeps_one_basis() -> None:
    assert resolve_bases(LoZO(), "fold", 1000, 16) == resolve_bases(LoZO(), "fold", 1000, 16, 1) == 1
    assert resolve_bases(FactorizedMeZO(rank=512), "fold", 1000, 512) == 1  # folded at every step: one block


@pytest.mark.parametrize(
    ("method", "space", "slot_rank", "requested", "message"),
    [
        (LoZO(rank=9), "bank", 16, None, "lozo.rank=9 and slot_rank=16: a slot holds.*18 in all; set rank <= 8, or set "
         "slot_rank=32"),
        (LoZO(rank=1), "fold", 1, None, "lozo.rank=1 and slot_rank=1: a slot holds.*2 in all; set slot_rank=8"),
        (LoZO(rank=128), "fold", 128, None, "256 in all; set rank <= 64, or set slot_rank=256"),
        (LoZO(rank=300), "fold", 512, None, "set rank <= 256, or vLLM has no slot rank >= 600"),
        (FactorizedMeZO(rank=300), "fold", 128, None, "a slot holds a probe; set rank <= 128, or set slot_rank=320"),
        (LoZO(), "bank", 16, 8, "bases=8 with lozo.rank=2 and slot_rank=16: expected at most 7; for more, set "
         "slot_rank=32"),
        (LoZO(), "fold", 16, 2, "bases=2: update_space='fold' keeps one basis"),
        (FactorizedMeZO(), "bank", 512, None, "update_space='bank': factorized-mezo cannot run in it"),
        (LoZO(), "attic", 16, None, "unknown update_space 'attic'.*Known: bank, fold"),
    ],
)  # fmt: skip
def test_a_rank_or_number_of_bases_that_does_not_fit_is_refused_with_the_fix(
    method: Method, space: str, slot_rank: int, requested: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_bases(method, space, 1000, slot_rank, requested)


def test_bases_return_in_turn_in_a_bank_and_never_in_fold() -> None:
    method = LoZO(interval=2)
    assert [basis_of(method, step, "bank", 3) for step in range(9)] == [0, 0, 1, 1, 2, 2, 0, 0, 1]
    assert [basis_of(method, step, "fold", 1) for step in range(9)] == [0, 0, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("steps", [1, 49, 50, 51, 100, 350, 351])
def test_a_bank_is_lozo_as_published_while_steps_fit_the_bases(steps: int) -> None:
    method = LoZO(rank=2, interval=50)
    assert num_intervals(method, steps) == -(-steps // 50)
    assert equals_published(method, "bank", steps, 7) == (steps <= 7 * 50)
    assert equals_published(method, "fold", steps, 1)


def test_the_log_line_says_whether_the_run_is_lozo_as_published() -> None:
    method = LoZO(rank=2, interval=50)
    line = describe_space(method, "bank", 350, 7)
    assert line.startswith("update_space=bank: 7 bases of rank 2, an adapter of rank 14;")
    assert line.endswith("equals lozo as published")
    line = describe_space(method, "bank", 1000, 7)
    assert "20 intervals share them" in line and "not lozo as published (slot_rank=64 or update_space=fold" in line
    assert "(update_space=fold would be)" in describe_space(method, "bank", 20_000, 7)
    assert "equals lozo as published" in describe_space(method, "fold", 1000, 1)


# --- target modules ---------------------------------------------------------------------------------------------------

OPT = [
    "model.decoder.layers.0.self_attn.q_proj",
    "model.decoder.layers.0.self_attn.out_proj",
    "model.decoder.layers.0.fc1",
    "model.decoder.layers.0.fc2",
]
LLAMA = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize(
    ("target_modules", "names", "expected"),
    [
        ("all-linear", OPT, OPT),
        ("all-linear", ["model.decoder.embed_tokens", *OPT, "lm_head"], OPT),
        ("mlp", ["model.decoder.embed_tokens", *OPT, "lm_head"], OPT[2:]),
        ("embeddings", ["model.decoder.embed_tokens", *OPT, "lm_head"], ["model.decoder.embed_tokens"]),
        ("lm_head", ["model.decoder.embed_tokens", *OPT, "lm_head"], ["lm_head"]),
        (
            r".*(embed_tokens|fc1)",
            ["model.decoder.embed_tokens", *OPT, "lm_head"],
            ["model.decoder.embed_tokens", OPT[2]],
        ),
        ("attention", OPT, OPT[:2]),
        ("mlp", OPT, OPT[2:]),
        ("attention", LLAMA, LLAMA[:1]),
        ("mlp", LLAMA, LLAMA[1:]),
        (r".*\.(q_proj|fc1)", OPT, [OPT[0], OPT[2]]),
    ],
)
def test_target_modules_select_by_hugging_face_name(target_modules: str, names: list[str], expected: list[str]) -> None:
    assert select_modules(target_modules, names) == expected


def test_an_expression_that_matches_no_whole_name_shows_the_names() -> None:
    with pytest.raises(ConfigError, match=f"target_modules='q_proj': matches no module.*{re.escape(OPT[0])}"):
        select_modules("q_proj", OPT)


@pytest.mark.parametrize(
    ("target_layers", "count", "expected"),
    [
        ("20:", 30, range(20, 30)),
        (":2", 30, range(2)),
        ("-10:", 30, range(20, 30)),
        ("-2:-1", 30, [28]),
        (":", 3, range(3)),
        ("20:400", 30, range(20, 30)),
        ("0, 5 ,28:", 30, [0, 5, 28, 29]),
        ("-1", 30, [29]),
        ("last", 30, [29]),
        ("top-third", 30, range(20, 30)),
        ("top-third", 2, [1]),
        ("top-half", 7, range(4, 7)),
    ],
)
def test_target_layers_select_by_number(target_layers: str, count: int, expected: Iterable[int]) -> None:
    assert select_layers(target_layers, count) == set(expected)


@pytest.mark.parametrize(
    ("target_layers", "why"),
    [("30", "not among them"), ("-31", "not among them"), ("30:", "selects none"), ("5:5", "selects none")],
)
def test_layers_that_the_model_does_not_have_are_refused(target_layers: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"target_layers='{target_layers}': the model has 30 layers, 0 to 29;.*{why}"):
        select_layers(target_layers, 30)


def test_layers_choose_among_the_modules_that_target_modules_names() -> None:
    names = [f"model.layers.{i}.{m}" for i in range(4) for m in ("self_attn.q_proj", "mlp.up_proj")]
    names = ["model.embed_tokens", *names, "lm_head"]
    assert select_modules("mlp", names, "2:") == ["model.layers.2.mlp.up_proj", "model.layers.3.mlp.up_proj"]
    assert select_modules(".*", names, "-1") == ["model.embed_tokens", *names[7:9], "lm_head"]
    with pytest.raises(ConfigError, match=r"target_layers='0': the modules that target_modules names are not in these"):
        select_modules(r".*\.3\..*", names, "0")
