"""What all objectives share: cells, templates, records that are refused, JSON and pickle."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from tiny import make_opt

from tests.objective_rows import OPTIONS, RECORD, TEMPLATE, classification, labels_row, logprobs_row
from vllm_zo.errors import ConfigError
from vllm_zo.objectives import (
    OBJECTIVES,
    Classification,
    EncodedExample,
    LanguageModeling,
    MultipleChoice,
    Objective,
    Preference,
    Reward,
    Rollout,
    cell_offsets,
    flatten_sequences,
)
from vllm_zo.registry import describe


def test_rows_are_numbered_example_by_example_and_own_their_cells() -> None:
    examples = [EncodedExample((logprobs_row(3), logprobs_row(2))), EncodedExample((labels_row(2),))]
    assert flatten_sequences(examples) == [logprobs_row(3), logprobs_row(2), labels_row(2)]
    assert cell_offsets(examples) == [0, 6, 10, 12]


@pytest.mark.parametrize(
    ("objective", "record"),
    [
        (classification(), RECORD),
        (classification(mode="full"), RECORD),
        (MultipleChoice("{a}"), {"a": "It was", "choices": ["dull", "great"], "label": 0}),
        (LanguageModeling(), {"prompt": "say good:", "completion": " good"}),
        (LanguageModeling(append_eos=False), {"prompt": "say good:", "completion": " good"}),
        (LanguageModeling(), {"prompt": "say good:", "completion": " good</s>"}),
        (Reward("{a}", reward="contains"), {"a": "It was"}),
    ],
)
def test_a_tokenizer_that_ends_every_text_changes_nothing(
    objective: Objective, record: dict[str, Any], ending_tokenizers: tuple[Any, Any]
) -> None:
    plain, ending = ending_tokenizers
    assert ending("a")["input_ids"] == [*plain("a")["input_ids"], 2]
    assert objective.encode(record, ending, "row 1") == objective.encode(record, plain, "row 1")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("It was", "no field; name the record's text field"),
        ("", "no field"),
        ("{sentence.} It was", r"\{sentence\.\} is not a plain field name"),
        ("{sentence[0]} It was", r"\{sentence\[0\]\} is not a plain field name"),
        ("{sentence.__class__}", "is not a plain field name"),
        ("{sentence!r} It was", r"\{sentence!r\} is not a plain field name"),
        ("{sentence:>9} It was", r"\{sentence:>9\} is not a plain field name"),
        ("{0} It was", r"\{0\} is not a plain field name"),
        ("{} It was", r"\{\} is not a plain field name"),
        ("{sentence It was", "write {{ or }} for a literal brace"),
        (None, "template=None: expected a string"),
    ],
)
def test_a_template_takes_plain_field_names_only(template: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Classification(template, OPTIONS)
    if template is not None:  # None is LanguageModeling's "no template"
        with pytest.raises(ConfigError, match=message):
            LanguageModeling(template=template)


@pytest.mark.parametrize(
    ("objective", "record", "message"),
    [
        (classification(), {"text": "dull", "label": 0}, "row 3: no field 'sentence'; the record has 'text', 'label'"),
        (classification(), {"sentence": "dull"}, "row 3: no field 'label'; the record has 'sentence'"),
        (
            classification(),
            {"sentence": None, "label": 0},
            r"row 3: field 'sentence' has no value \(None\); fill it in, or leave the row out",
        ),
        (classification(), {"sentence": ["a"], "label": 0}, "row 3: field 'sentence' is .*expected text"),
        (LanguageModeling(), {"prompt": "a"}, "row 3: no field 'completion'; the record has 'prompt'"),
        (LanguageModeling(), {"prompt": "a", "completion": ""}, "row 3: field 'completion' is empty"),
        (classification(), {"sentence": float("nan"), "label": 0}, r"row 3: field 'sentence' has no value \(nan\)"),
        (LanguageModeling(), {"prompt": "a", "completion": True}, "row 3: field 'completion' is True, expected text"),
        (LanguageModeling(), {"prompt": "a", "completion": float("nan")}, r"row 3: field 'completion' has no value"),
        (LanguageModeling(), {"prompt": float("inf"), "completion": "a"}, "row 3: field 'prompt' is inf, expected"),
        (
            Classification("{context.title} It was", [" terrible", " great"]),
            {"context": {"title": "dull"}, "label": 0},
            "row 3: no field 'context.title', and fields of fields are not read: write what 'context' holds into",
        ),
        (
            LanguageModeling(completion_field="answers.text"),
            {"prompt": "a", "answers": {"text": "dull"}},
            "row 3: no field 'answers.text', and fields of fields are not read: write what 'answers' holds into",
        ),
    ],
)
def test_a_bad_record_is_named(objective: Objective, record: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        objective.encode(record, tokenizer, "row 3")


EXAMPLES_OF_EACH: list[Objective] = [
    classification(),
    classification(labels=[True, False], mode="full", bos_token_id=0, label_field="positive"),
    LanguageModeling(),
    LanguageModeling(template="{q}", completion_field="a", append_eos=False, prefix=" ", suffix="\n"),
    MultipleChoice("{q}", ["a", "b"], loss_kind="likelihood"),
    MultipleChoice("{q}"),
    Preference(beta=0.3, chosen_field="good"),
    Reward("{q}", reward="token_f1", stop=["\n"], samples=2, shaping="rank"),
    Reward(
        "{q}", grader={"type": "string_check", "name": "n", "operation": "eq", "input": "{{item.a}}", "reference": "x"}
    ),
    Rollout("module:play", server={"tool_call_parser": "hermes"}, on_failure="floor", floor=-1.0),
    Rollout(url="https://host/play"),
]


@pytest.mark.parametrize("objective", EXAMPLES_OF_EACH, ids=repr)
def test_an_objective_survives_json_and_pickle(objective: Objective) -> None:
    assert isinstance(objective, Objective)
    assert OBJECTIVES.build(json.loads(json.dumps(describe(objective)))) == objective
    assert pickle.loads(pickle.dumps(objective)) == objective
    assert hash(objective) == hash(pickle.loads(pickle.dumps(objective)))


def test_every_objective_is_tried_here() -> None:
    assert {objective.name for objective in EXAMPLES_OF_EACH} == set(OBJECTIVES)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("clasification", {}, "unknown objective 'clasification': did you mean 'classification'"),
        (
            "classification",
            {"templat": "x"},
            "unknown setting of objective classification 'templat': did you mean 'template'",
        ),
        ("classification", {"template": TEMPLATE}, "objective.options is missing: objective 'classification' needs it"),
        ("language-modeling", {"eos": 1}, "unknown setting of objective language-modeling 'eos'"),
    ],
)
def test_an_unknown_or_missing_word_is_answered_with_the_known_ones(
    name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        OBJECTIVES.build(name, **settings)


def test_tiny_models_are_the_same_bits_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_opt(tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
