"""Multiple choice: choices that belong to the example, their loss, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.objective_rows import ROUNDING, logprobs_row, naive_classification, naive_scores
from vllm_zo.errors import ConfigError
from vllm_zo.objectives import (
    EncodedExample,
    MultipleChoice,
    ScoringSequence,
    cell_offsets,
)


@pytest.mark.parametrize("kind", ["choice", "likelihood"])
def test_multiple_choice_with_as_many_choices_as_an_example_has(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    examples = []
    for count, gold in ((2, 1), (4, 3), (3, 0), (2, 0), (5, 2)):
        lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
        examples.append(EncodedExample(tuple(logprobs_row(n) for n in lengths), gold))
    cells_PC = -3 * torch.rand(3, cell_offsets(examples)[-1], generator=generator)
    losses_PE, predictions_PE = MultipleChoice("{q}", loss_kind=kind).loss(cells_PC, examples)
    for cells, losses, predictions in zip(cells_PC.double().tolist(), losses_PE, predictions_PE, strict=True):
        expected, best = naive_classification(cells, examples)
        if kind == "likelihood":
            scores = naive_scores(cells, examples)
            expected = [-s[e.gold] for s, e in zip(scores, examples, strict=True)]
        torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float32), **ROUNDING)
        assert predictions.tolist() == best
    cells_PC[0, 0] = torch.nan
    spoiled = MultipleChoice("{q}").loss(cells_PC, examples)[0][0]
    assert spoiled.isfinite().tolist() == [False, True, True, True, True]


COPA = {
    "premise": "The man turned on the faucet so",
    "choice1": "the toilet filled.",
    "choice2": "water flowed.",
    "label": 1,
}


def test_choices_from_fields_and_from_a_list_are_the_same_rows(tokenizer: Any) -> None:
    by_field = MultipleChoice("{premise}", ["choice1", "choice2"]).encode(COPA, tokenizer, "row 1")
    listed = {"premise": COPA["premise"], "choices": [COPA["choice1"], COPA["choice2"]], "label": "water flowed."}
    assert MultipleChoice("{premise}").encode(listed, tokenizer, "row 1") == by_field
    assert by_field.gold == 1 and by_field.num_candidates == 2
    stem = tokenizer(COPA["premise"]).input_ids
    for row, choice in zip(by_field.sequences, (COPA["choice1"], COPA["choice2"]), strict=True):
        full = tokenizer(f"{COPA['premise']} {choice}").input_ids
        assert row == ScoringSequence(
            tuple(full[:-1]), tuple(range(len(stem) - 1, len(full) - 1)), tuple(full[len(stem) :]), "logprobs"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": "water"}, "expected a list of at least two texts"),
        ({"choices": ["water"]}, "expected a list of at least two texts"),
        ({"choices": ["a", [2]]}, "field 'choices'[1] is [2], expected text or a number"),
        ({"choices": ["a", float("nan")]}, "field 'choices'[1] is nan, expected text or a number"),
        ({"choices": ["water", " water "]}, "equal token ids"),
        ({"label": 2}, "label 2 is outside"),
        ({"label": "fire"}, "label 'fire' is outside"),
        ({"premise": None}, "field 'premise' has no value"),
        ({"choices": [7, 8], "label": 8}, "outside options '7', '8' and the indices 0 to 1; set label_is='index' or"),
        ({"choices": [1, 0], "label": "1"}, "label '1' may be option '1' or index 1; set label_is='index' or"),
    ],
)
def test_multiple_choice_refuses_a_bad_record(tokenizer: Any, change: dict[str, Any], message: str) -> None:
    record = {"premise": "The man", "choices": ["water", "fire and ice"], "label": 0} | change
    with pytest.raises(ConfigError, match="row 7.*" + re.escape(message)):
        MultipleChoice("{premise}").encode(record, tokenizer, "row 7")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choices": 3}, "choices=3"),
        ({"choices": ["one"]}, "at least two fields"),
        ({"choices": []}, "choices="),
        ({"choices": ["a", ""]}, "choices="),
        ({"loss_kind": "likelyhood"}, "did you mean 'likelihood'"),
        ({"separator": None}, "separator=None"),
        ({"bos_token_id": -1}, "bos_token_id=-1"),
    ],
)
def test_multiple_choice_refuses_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        MultipleChoice("{premise}", **settings)


@pytest.mark.parametrize(
    ("label", "label_is", "gold"),
    [(2, "auto", 2), (2.0, "auto", 2), ("4", "auto", 2), ("2", "index", 2), ("2", "text", 1), (2, "text", 1)],
)
def test_choices_may_be_numbers(label: Any, label_is: Any, gold: int, tokenizer: Any) -> None:
    """A number is an index; a text is one too where it is no choice, and the job may say what it is."""
    record = {"question": "How many sides has a square?", "choices": [8, 2, 4.5, 1], "answer": label}
    record["choices"] = [8, 2, 4, 1] if label == "4" else record["choices"]
    objective = MultipleChoice("{question} Answer:", label_field="answer", label_is=label_is)
    encoded = objective.encode(record, tokenizer, "row 1")
    texts = objective.encode(record | {"choices": list(map(str, record["choices"]))}, tokenizer, "row 1")
    assert encoded == texts and encoded.gold == gold
