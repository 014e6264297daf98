"""Task presets: the prompts of the papers word for word, their splits, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.text import render
from vllm_zo.tasks import PRESETS, Task, load_task

RECORDS: dict[str, list[dict[str, Any]]] = {
    "sst2": [{"sentence": " a film of charm ", "label": 1}, {"sentence": "dull", "label": 0}],
    "rte": [
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"},
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": 1},
    ],
    "cb": [
        {"premise": "It may rain.", "hypothesis": "it rains", "label": "neutral"},
        {"premise": "It rains.", "hypothesis": "it rains", "label": 0},
    ],
    "boolq": [
        {"passage": "Rain is water.", "question": "is rain wet", "answer": True},
        {"passage": "Rain is water.", "question": "Is rain dry?", "label": 0},
    ],
    "wic": [
        {"word": "bank", "sentence1": "The river bank.", "sentence2": "A bank loan.", "label": 0},
        {"word": "rain", "sentence1": "Rain fell.", "sentence2": "The rain.", "label": True},
    ],
    "copa": [
        {"premise": "It rained. ", "choice1": "I got wet.", "choice2": "The sun shone.", "question": "effect",
         "label": 0},
        {"premise": "It rained.", "choice1": "I got wet.", "choice2": "The sky was grey.", "question": "cause",
         "label": 1},
    ],
    "trec": [
        {"question": "What is rain ?", "label": "DESC"},
        {"text": "Who made it ?", "coarse_label": 3, "fine_label": 7},
    ],
    "squad": [
        {"title": "Rain", "context": "Rain is water.", "question": " What is rain? ", "answers": ["water", "rain"]},
        {"title": "Rain", "context": "Rain is water.", "question": "What?",
         "answers": {"text": ["water"], "answer_start": [8]}},
    ],
}  # fmt: skip
"""Two records each, in the fields of our files and of the Hugging Face data sets."""

PROMPTS = {
    "sst2": ("a film of charm It was", "a film of charm It was great"),
    "rte": (
        'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n',
        'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\nYes',
    ),
    "cb": (
        'Suppose It may rain. Can we infer that "it rains"? Yes, No, or Maybe?\n',
        'Suppose It may rain. Can we infer that "it rains"? Yes, No, or Maybe?\nMaybe',
    ),
    "boolq": ("Rain is water. Is rain wet?", "Rain is water. Is rain wet? Yes"),
    "wic": (
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nThe river bank.\nA bank loan.\n',
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "The river bank.\nA bank loan.\nNo",
    ),
    "copa": ("It rained so", "It rained so I got wet."),
    "trec": ("What is rain ?\nType:", "What is rain ?\nType: Description"),
    "squad": (
        "Title: Rain\nContext: Rain is water.\nQuestion: What is rain?\nAnswer:",
        "Title: Rain\nContext: Rain is water.\nQuestion: What is rain?\nAnswer: water\n",
    ),
}
"""Prompt, and prompt with the right answer, of the first record: large_models/templates.py of princeton-nlp/MeZO."""


def write(directory: Path, name: str, train: int, validation: int) -> Path:
    """A data directory of `name`, in which row i can be recognised by its field `i`."""
    for split, count in (("train", train), ("validation", validation)):
        rows = [RECORDS[name][i % 2] | {"i": i} for i in range(count)]
        (directory / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


def test_every_preset_is_tried_here() -> None:
    assert set(RECORDS) == set(PROMPTS) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_the_prompt_and_the_right_answer_are_those_of_the_paper(name: str, tokenizer: Any) -> None:
    preset = PRESETS[name]
    record = preset.prepare(RECORDS[name][0], "row 1")
    prompt, full = PROMPTS[name]
    assert render(preset.objective.template, record, "row 1") == prompt
    encoded = preset.objective.encode(record, tokenizer, "row 1")
    row = encoded.sequences[0] if len(encoded.sequences) == 1 else encoded.sequences[encoded.gold]
    label = row.label_ids[encoded.gold] if row.kind == "labels" else row.label_ids[-1]
    assert [*row.token_ids, label] == tokenizer(full).input_ids


@pytest.mark.parametrize("name", PRESETS)
def test_records_of_the_hub_are_read_as_well(name: str, tokenizer: Any) -> None:
    preset = PRESETS[name]
    encoded = preset.objective.encode(preset.prepare(RECORDS[name][1], "row 2"), tokenizer, "row 2")
    gold = {"sst2": 0, "rte": 1, "cb": 0, "boolq": 1, "wic": 1, "copa": 1, "trec": 3, "squad": 0}[name]
    assert encoded.gold == gold


def test_splits_are_those_of_the_official_code(tmp_path: Path) -> None:
    task = load_task("sst2", write(tmp_path, "sst2", 40, 10), seed=3, train=20, dev=8, test=6)
    order = np.random.RandomState(3).permutation(40)
    assert [row["i"] for row in task.train] == order[:20].tolist()
    assert [row["i"] for row in task.validation] == order[20:28].tolist()
    assert [row["i"] for row in task.test] == np.random.RandomState(3).permutation(10)[:6].tolist()
    assert isinstance(task, Task) and (task.name, task.final_objective) == ("sst2", task.objective)


def test_a_small_set_gives_up_training_rows_and_test_takes_what_there_is(tmp_path: Path) -> None:
    task = load_task("cb", write(tmp_path, "cb", 150, 5))
    assert (len(task.train), len(task.validation), len(task.test)) == (50, 100, 5)
    assert not {row["i"] for row in task.train} & {row["i"] for row in task.validation}
    assert len(load_task("cb", tmp_path, test=None, dev=20).test) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sst-2"}, "unknown task 'sst-2': did you mean 'sst2'"),
        ({"data": "nowhere"}, "data='nowhere': no such directory"),
        ({"dev": 40}, "dev=40: sst2 has 40 training rows"),
        ({"dev": 0}, "dev=0"),
        ({"train": 0}, "train=0"),
        ({"test": 0}, "test=0"),
        ({"seed": -1}, "data_seed=-1"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(**{"name": "sst2", "data": write(tmp_path, "sst2", 40, 10), "dev": 8} | arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("copa", {"question": "why"}, "train.jsonl, row 1: field 'question' is 'why', expected 'cause' or 'effect'"),
        ("copa", {"choice2": None}, "train.jsonl, row 1: field 'choice2' is None"),
        ("boolq", {"question": None}, "train.jsonl, row 1: field 'question' is None"),
    ],
)
def test_a_row_without_its_fields_is_named(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    write(tmp_path, name, 8, 4)
    rows = [RECORDS[name][0] | change] * 8
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=message):
        load_task(name, tmp_path, dev=2)
