"""Objectives against naive float64 loops over examples and candidates, and against a real tiny model."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_opt, make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from vllm_zo.errors import ConfigError
from vllm_zo.objectives import (
    OBJECTIVES,
    Classification,
    EncodedExample,
    LanguageModeling,
    MultipleChoice,
    Objective,
    Reward,
    ScoringRow,
    build_objective,
    describe,
    flatten_rows,
    row_offsets,
)

TEMPLATE = "{sentence} It was"
OPTIONS = [" terrible", " great"]
RECORD = {"sentence": "a film of great charm", "label": 1}
ROUNDING = {"rtol": 2e-6, "atol": 2e-6}
"""float32 against float64: cells of a few nats, sums of at most 5 of them, one softmax; a few ulps of 2.4e-7 each."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that puts nothing before a text."""
    return make_tokenizer(tmp_path_factory.mktemp("plain"), bos=None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_opt(tmp_path_factory.mktemp("opt"))).eval()


def classification(**settings: Any) -> Classification:
    return Classification(TEMPLATE, settings.pop("options", OPTIONS), **settings)


def labels_row(candidates: int) -> ScoringRow:
    return ScoringRow((5, 6, 7), (2,), tuple(range(candidates)), "labels")


def logprobs_row(tokens: int) -> ScoringRow:
    return ScoringRow(tuple(range(tokens + 3)), tuple(range(2, 2 + tokens)), tuple(range(tokens)), "logprobs")


def random_examples(candidates: int, single: Sequence[bool]) -> list[EncodedExample]:
    """Examples of both kinds, with options of 1 to 5 tokens and every candidate right some time."""
    generator = torch.Generator().manual_seed(candidates)
    examples = []
    for i, one_row in enumerate(single):
        lengths = torch.randint(1, 6, (candidates,), generator=generator).tolist()
        rows = (labels_row(candidates),) if one_row else tuple(logprobs_row(n) for n in lengths)
        examples.append(EncodedExample(rows, gold=i % candidates))
    return examples


def naive_scores(cells: list[float], examples: Sequence[EncodedExample]) -> list[list[float]]:
    """Scores of the candidates of every example: pop cells from the front of the table."""
    cells = list(cells)
    scores = []
    for example in examples:
        of_example = []
        for row in example.rows:
            taken, cells = cells[: len(row.label_ids)], cells[row.num_cells :]
            of_example += taken if row.kind == "labels" else [sum(taken) / len(taken)]
        scores.append(of_example)
    assert not cells
    return scores


def naive_classification(cells: list[float], examples: Sequence[EncodedExample]) -> tuple[list[float], list[int]]:
    losses, predictions = [], []
    for scores, example in zip(naive_scores(cells, examples), examples, strict=True):
        scores_N = torch.tensor(scores, dtype=torch.float64)
        losses.append(-scores_N.log_softmax(0)[example.gold].item())
        predictions.append(int(scores_N.argmax()))
    return losses, predictions


@torch.no_grad()
def score_rows(model: Any, examples: Sequence[EncodedExample], dtype: torch.dtype = torch.float64) -> Tensor:
    """(1, C) cells by the definition in `objectives/base.py`, one forward pass a row."""
    cells: list[Tensor] = []
    for row in flatten_rows(examples):
        logits = model.to(dtype)(torch.tensor([row.token_ids])).logits[0, list(row.positions)]
        if row.kind == "labels":
            cells += logits[0, list(row.label_ids)]
        else:
            cells += [line.log_softmax(-1)[t] for line, t in zip(logits, row.label_ids, strict=True)]
            cells += [line.log_softmax(-1).max() for line in logits]
    return torch.stack(cells)[None]


# --- the cell table and the losses ------------------------------------------------------------------------------------


def test_rows_are_numbered_example_by_example_and_own_their_cells() -> None:
    examples = [EncodedExample((logprobs_row(3), logprobs_row(2))), EncodedExample((labels_row(2),))]
    assert flatten_rows(examples) == [logprobs_row(3), logprobs_row(2), labels_row(2)]
    assert row_offsets(examples) == [0, 6, 10, 12]


@pytest.mark.parametrize("candidates", [2, 3, 6])
@pytest.mark.parametrize(
    "single", [[True] * 8, [False] * 8, [True, False, False, True] * 2], ids=["one-row", "rows", "mixed"]
)
def test_classification_loss_equals_a_naive_loop_over_examples(candidates: int, single: list[bool]) -> None:
    examples = random_examples(candidates, single)
    objective = classification(options=[f" w{i}" for i in range(candidates)])
    cells_PC = 3 * torch.randn(4, row_offsets(examples)[-1], generator=torch.Generator().manual_seed(1))
    losses_PE, predictions_PE = objective.loss(cells_PC, examples)
    assert losses_PE.dtype == torch.float32 and predictions_PE.dtype == torch.int64
    for cells, losses, predictions in zip(cells_PC.double().tolist(), losses_PE, predictions_PE, strict=True):
        expected_losses, expected_predictions = naive_classification(cells, examples)
        torch.testing.assert_close(losses, torch.tensor(expected_losses, dtype=torch.float32), **ROUNDING)
        assert predictions.tolist() == expected_predictions


def test_language_modeling_loss_is_the_mean_nats_per_completion_token() -> None:
    examples = [EncodedExample((logprobs_row(n),)) for n in (1, 5, 3, 4)]
    cells_PC = -torch.rand(3, row_offsets(examples)[-1], generator=torch.Generator().manual_seed(2))
    losses_PE, predictions_PE = LanguageModeling().loss(cells_PC, examples)
    expected = [[-scores[0] for scores in naive_scores(cells, examples)] for cells in cells_PC.double().tolist()]
    torch.testing.assert_close(losses_PE, torch.tensor(expected, dtype=torch.float32), **ROUNDING)
    naive = []
    for cells in cells_PC.tolist():
        naive.append([])
        for example in examples:
            n = len(example.rows[0].label_ids)
            own, cells = cells[: 2 * n], cells[2 * n :]
            naive[-1].append(sum(not a >= b for a, b in zip(own[:n], own[n:], strict=True)))
    assert predictions_PE.tolist() == naive
    assert len({count for counts in naive for count in counts}) > 2


def test_a_completion_that_greedy_decoding_gives_is_right() -> None:
    cells = torch.tensor([[-0.5, -0.1, -0.5, -0.1], [-0.5, -0.2, -0.5, -0.1], [-0.5, torch.nan, -0.4, -0.1]])
    _, predictions = LanguageModeling().loss(cells, [EncodedExample((logprobs_row(2),))])
    assert predictions.tolist() == [[0], [1], [2]]


@pytest.mark.parametrize("kind", ["choice", "likelihood"])
def test_multiple_choice_with_as_many_choices_as_an_example_has(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    examples = []
    for count, gold in ((2, 1), (4, 3), (3, 0), (2, 0), (5, 2)):
        lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
        examples.append(EncodedExample(tuple(logprobs_row(n) for n in lengths), gold))
    cells_PC = -3 * torch.rand(3, row_offsets(examples)[-1], generator=generator)
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


def test_choice_metrics_known_answers() -> None:
    examples = [EncodedExample((labels_row(3),), gold) for gold in (0, 0, 1, 2)]
    # class 0: tp 1, fn 1, fp 0; class 1: tp 1, fp 1; class 2: fn 1
    metrics = classification().metrics([0.0] * 4, [0, 1, 1, 1], examples)
    assert metrics == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 2 / 4 + 0) / 3)}
    ragged = [EncodedExample((logprobs_row(1),) * n, 0) for n in (2, 3)]
    assert MultipleChoice("{q}").metrics([0.0] * 2, [0, 1], ragged) == {"accuracy": 0.5}


def test_completion_metrics_known_answers() -> None:
    examples = [EncodedExample((logprobs_row(n),)) for n in (1, 3)]
    metrics = LanguageModeling().metrics([2.0, 1.0], [0, 2], examples)
    assert metrics == {
        "accuracy": 0.5, "token_accuracy": pytest.approx(0.5), "perplexity": pytest.approx(math.exp(5 / 4)),
    }  # fmt: skip


def test_two_single_token_options_give_softplus_of_the_logit_difference() -> None:
    example = EncodedExample((labels_row(2),), gold=1)
    cells_PC = torch.tensor([[0.5, 2.0]])
    expected = torch.log1p(torch.exp(torch.tensor(0.5 - 2.0)))
    torch.testing.assert_close(classification().loss(cells_PC, [example])[0][0, 0], expected)


def test_a_confident_example_keeps_a_loss_above_zero() -> None:
    """-log_softmax gives exactly 0 from a margin of 17 nats on in float32, and a pair of zeros has no slope."""
    cells_PC = torch.tensor([[100.0, 130.0], [100.0, 130.5]])
    losses_PE, _ = classification().loss(cells_PC, [EncodedExample((labels_row(2),), gold=1)])
    expected = torch.log1p(torch.exp(torch.tensor([[-30.0], [-30.5]], dtype=torch.float64)))
    torch.testing.assert_close(losses_PE, expected.float(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_cell_that_is_not_finite_spoils_its_own_example_only(bad: float) -> None:
    examples = random_examples(2, [False] * 4)
    offsets = row_offsets(examples)
    cells_PC = torch.randn(1, offsets[-1], generator=torch.Generator().manual_seed(3))
    cells_PC[0, 0] = bad  # a cell of example 0's gold option; cell 0 is where a naive padding would point
    losses_E = classification().loss(cells_PC, examples)[0][0]
    assert losses_E.isfinite().tolist() == [False, True, True, True]


def test_loss_keeps_float64_and_lifts_half_precision_to_float32() -> None:
    example = [EncodedExample((labels_row(2),))]
    for given, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert classification().loss(torch.ones(1, 2, dtype=given), example)[0].dtype == expected


@pytest.mark.gpu
def test_losses_on_the_device_equal_those_on_the_cpu() -> None:
    examples = random_examples(3, [False, True] * 8)
    cells_PC = torch.randn(4, row_offsets(examples)[-1])
    objective = classification(options=[" a", " b", " c"])
    on_device, _ = objective.loss(cells_PC.cuda(), examples)
    assert on_device.is_cuda
    torch.testing.assert_close(on_device.cpu(), objective.loss(cells_PC, examples)[0], **ROUNDING)


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_single_token_options_need_one_row_scored_at_the_last_prompt_token(tokenizer: Any) -> None:
    encoded = classification().encode(RECORD, tokenizer, "row 1")
    prompt = tokenizer("a film of great charm It was").input_ids
    options = [tokenizer(option, add_special_tokens=False).input_ids[0] for option in OPTIONS]
    assert encoded == EncodedExample((ScoringRow(tuple(prompt), (len(prompt) - 1,), tuple(options), "labels"),), gold=1)


def test_longer_options_are_full_sequences_scored_at_their_own_tokens(tokenizer: Any) -> None:
    options = [" terrible", " great charm"]
    encoded = classification(options=options).encode(RECORD, tokenizer, "row 1")
    prompt = tokenizer("a film of great charm It was").input_ids
    for option, row in zip(options, encoded.rows, strict=True):
        full = tokenizer("a film of great charm It was" + option).input_ids
        assert row.kind == "logprobs" and row.token_ids == tuple(full[:-1])
        assert row.label_ids == tuple(full[len(prompt) :]) and row.positions[0] == len(prompt) - 1
        assert [full[p + 1] for p in row.positions] == list(row.label_ids)


def test_a_boundary_that_merges_is_not_a_single_token(tokenizer: Any) -> None:
    """ " wa" + "s" is the token " was": prompt tokens and one more would be another text than prompt + option."""
    objective = Classification("{sentence} It wa", ["s", "nt"])
    encoded = objective.encode(RECORD, tokenizer, "row 1")
    merged = tokenizer("a film of great charm It was").input_ids
    assert [row.kind for row in encoded.rows] == ["logprobs", "logprobs"]
    assert encoded.rows[0].token_ids + encoded.rows[0].label_ids[-1:] == tuple(merged)
    assert encoded.rows[0].label_ids == (merged[-1],)
    with pytest.raises(ConfigError, match=r"row 1: option 's' is not a single token .* use mode='auto'"):
        Classification("{sentence} It wa", ["s", "nt"], mode="single-token").encode(RECORD, tokenizer, "row 1")


def test_a_prompt_that_splits_anew_before_an_option_is_not_a_single_token() -> None:
    """One token more than the prompt, but not the prompt's tokens: the logits at its end are of another text."""
    token_ids = {"dull It was": [2, 5, 6], "dull It was a": [2, 5, 7, 8], "dull It was b": [2, 5, 6, 9]}

    def tokenizer(texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [token_ids[text] for text in texts]}

    encoded = classification(options=[" a", " b"]).encode({"sentence": "dull", "label": 0}, tokenizer, "row 1")
    assert encoded.rows == (
        ScoringRow((2, 5, 7), (1, 2), (7, 8), "logprobs"),
        ScoringRow((2, 5, 6), (2,), (9,), "logprobs"),
    )


def test_single_token_and_full_scoring_agree_on_a_real_model(tokenizer: Any, model: Any) -> None:
    records = [
        {"sentence": s, "label": i % 2} for i, s in enumerate(["dull", "a quiet film", "nothing happens for two hours"])
    ]
    losses, predictions = [], []
    for mode in ("single-token", "full"):
        objective = classification(mode=mode)
        examples = [objective.encode(record, tokenizer, "row") for record in records]
        assert {row.kind for row in flatten_rows(examples)} == {"labels" if mode == "single-token" else "logprobs"}
        loss_PE, prediction_PE = objective.loss(score_rows(model, examples), examples)
        losses.append(loss_PE)
        predictions.append(prediction_PE)
    torch.testing.assert_close(
        losses[0], losses[1], rtol=1e-10, atol=1e-10
    )  # float64; the roads differ in rounding only
    assert predictions[0].equal(predictions[1])
    assert losses[0].std() > 0.01, "a model too flat to tell a wrong row"


def test_longer_options_score_as_mezo_scores_them(tokenizer: Any, model: Any) -> None:
    """MeZO: the last len(full) - len(prompt) tokens of the whole sequence, mean of their log-probabilities."""
    options = [" terrible from start to end", " great"]
    objective = classification(options=options)
    example = objective.encode(RECORD, tokenizer, "row 1")
    scores = []
    prompt_len = len(tokenizer("a film of great charm It was").input_ids)
    for option in options:
        full = torch.tensor(tokenizer("a film of great charm It was" + option).input_ids)
        with torch.no_grad():
            log_probs = model.double()(full[None]).logits[0, :-1].log_softmax(-1).gather(-1, full[1:, None])
        scores.append(log_probs[-(len(full) - prompt_len) :].mean())
    expected = torch.nn.functional.cross_entropy(torch.stack(scores)[None], torch.tensor([1]))
    loss_PE, _ = objective.loss(score_rows(model, [example]), [example])
    torch.testing.assert_close(loss_PE[0, 0], expected, rtol=1e-10, atol=1e-10)


def test_language_modeling_scores_the_completion_and_eos_and_nothing_else(tokenizer: Any, model: Any) -> None:
    objective = LanguageModeling()
    example = objective.encode({"prompt": "a quiet film", "completion": " It was great"}, tokenizer, "row 1")
    prompt = tokenizer("a quiet film").input_ids
    full = torch.tensor([*tokenizer("a quiet film It was great").input_ids, tokenizer.eos_token_id])
    assert len(example.rows) == 1 and example.rows[0].label_ids == tuple(full[len(prompt) :].tolist())
    with torch.no_grad():
        logits = model.double()(full[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[len(prompt) - 1 : -1], full[len(prompt) :])
    loss_PE, _ = objective.loss(score_rows(model, [example]), [example])
    torch.testing.assert_close(loss_PE[0, 0], expected, rtol=1e-10, atol=1e-10)


def test_language_modeling_without_eos_ends_with_the_completion(tokenizer: Any) -> None:
    objective = LanguageModeling(template="{q} It was", completion_field="a", append_eos=False)
    row = objective.encode({"q": " dull ", "a": " great"}, tokenizer, "row 1").rows[0]
    assert tokenizer.decode(row.label_ids) == " great"
    assert row.token_ids == tuple(tokenizer("dull It was").input_ids)


def test_prompts_start_as_the_tokenizer_starts_them_unless_bos_is_pinned(tokenizer: Any, plain_tokenizer: Any) -> None:
    def ids(tokenizer: Any, bos: int | None) -> tuple[int, ...]:
        return classification(bos_token_id=bos).encode(RECORD, tokenizer, "row 1").rows[0].token_ids

    text = tuple(plain_tokenizer("a film of great charm It was").input_ids)
    assert ids(tokenizer, None) == (2, *text)
    assert ids(tokenizer, 0) == ids(plain_tokenizer, 0) == (0, *text)
    assert ids(plain_tokenizer, None) == text


def test_values_are_stripped_and_braces_in_them_mean_nothing(tokenizer: Any) -> None:
    record = {"sentence": "  {label} {0}\n", "stars": 4, "label": 0}
    encoded = Classification("{sentence} {{{stars}}} It was", OPTIONS).encode(record, tokenizer, "row 1")
    assert tokenizer.decode(encoded.rows[0].token_ids) == "</s>{label} {0} {4} It was"


def test_an_empty_value_leaves_no_space_at_the_start_as_in_mezo(tokenizer: Any) -> None:
    encoded = classification().encode({"sentence": " ", "label": 0}, tokenizer, "row 1")
    assert list(encoded.rows[0].token_ids) == tokenizer("It was").input_ids


def test_an_option_may_bring_the_space_or_the_template_may(tokenizer: Any) -> None:
    ours = classification().encode(RECORD, tokenizer, "row 1")
    assert Classification(TEMPLATE + " ", ["terrible", "great"]).encode(RECORD, tokenizer, "row 1") == ours


# --- labels -----------------------------------------------------------------------------------------------------------

NLI = ["entailment", "not_entailment"]


@pytest.mark.parametrize(
    ("labels", "value", "gold"),
    [
        (None, 1, 1),
        (None, "0", 0),
        (None, True, 1),
        (None, " great", 1),
        (None, "terrible", 0),
        (NLI, "not_entailment", 1),
        (NLI, "great", 1),
        (NLI, 0, 0),
        ([1, 2], 1, 0),
        ([1, 2], "2", 1),
        ([-1, 1], -1, 0),
        (["yes", "no"], " no ", 1),
    ],
)
def test_a_label_is_found_by_name_by_option_or_by_index(labels: Any, value: Any, gold: int, tokenizer: Any) -> None:
    record = {"sentence": "dull", "label": value}
    assert classification(labels=labels).encode(record, tokenizer, "row 1").gold == gold


@pytest.mark.parametrize(
    ("labels", "value", "message"),
    [
        (None, 2, r"row 7: label 2 is outside options ' terrible', ' great' and the indices 0 to 1\."),
        (None, -1, "label -1 is outside"),  # what hidden labels of test splits are
        (None, "superb", "label 'superb' is outside options"),
        (None, None, "label None is outside"),
        (None, [1], r"label \[1\] is outside"),
        (None, 1.0, r"label 1\.0 is outside"),
        (None, "", "label '' is outside"),
        ([1, 2], 0, r"label 0 is outside labels 1, 2\."),
        (NLI, "neutral", "label 'neutral' is outside labels 'entailment', 'not_entailment' and the indices 0 to 1"),
    ],
)
def test_a_label_outside_the_options_is_named(labels: Any, value: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        classification(labels=labels).encode({"sentence": "dull", "label": value}, tokenizer, "row 7")


def test_a_number_that_is_both_an_option_and_an_index_is_refused(tokenizer: Any) -> None:
    objective = Classification("{text} Stars:", [" 0", " 1", " 3"], label_field="stars")
    assert objective.encode({"text": "dull", "stars": 1}, tokenizer, "row 1").gold == 1  # both mean the same
    with pytest.raises(ConfigError, match=r"row 1: label 1 may be option ' 1' or index 1; set labels="):
        Classification("{text} Stars:", [" 1", " 2"], label_field="stars").encode(
            {"text": "dull", "stars": 1}, tokenizer, "row 1"
        )
    named = Classification("{text} Stars:", [" 1", " 2"], label_field="stars", labels=[1, 2])
    assert named.encode({"text": "dull", "stars": 1}, tokenizer, "row 1").gold == 0


# --- bad settings and records -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("It was", "no field; name the record's text field"),
        ("", "no field"),
        ("{sentence.text} It was", r"\{sentence\.text\} is not a plain field name"),
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
    ("settings", "message"),
    [
        ({"options": [" great"]}, "options=.*at least two"),
        ({"options": " great"}, "options=' great': expected a list"),
        ({"options": [" great", " "]}, "options=.*non-empty"),
        ({"options": [" great", 1]}, "options=.*texts"),
        ({"options": [" great", "great"]}, "options=.*texts that differ"),
        ({"labels": ["a"]}, r"labels=\('a',\): 1 labels for 2 options"),
        ({"labels": ["1", 1]}, "labels=.*values that differ"),
        ({"labels": ["a", None]}, "labels=.*texts or integers"),
        ({"label_field": 3}, "label_field=3: expected the name of a field"),
        ({"mode": "single"}, "unknown mode 'single': did you mean 'single-token'"),
        ({"bos_token_id": -1}, "bos_token_id=-1: expected an integer >= 0"),
        ({"bos_token_id": "<s>"}, "bos_token_id='<s>': expected an integer"),
    ],
)
def test_a_classification_that_cannot_work_is_refused_on_creation(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classification(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_field": ""}, "prompt_field='': expected the name of a field"),
        ({"completion_field": None}, "completion_field=None: expected the name of a field"),
        ({"append_eos": 1}, "append_eos=1: expected True or False"),
    ],
)
def test_language_modeling_that_cannot_work_is_refused_on_creation(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LanguageModeling(**settings)


@pytest.mark.parametrize(
    ("objective", "record", "message"),
    [
        (classification(), {"text": "dull", "label": 0}, "row 3: no field 'sentence'; the record has 'text', 'label'"),
        (classification(), {"sentence": "dull"}, "row 3: no field 'label'; the record has 'sentence'"),
        (
            classification(),
            {"sentence": None, "label": 0},
            "row 3: field 'sentence' is None, expected text or a number",
        ),
        (classification(), {"sentence": ["a"], "label": 0}, "row 3: field 'sentence' is .*expected text"),
        (LanguageModeling(), {"prompt": "a"}, "row 3: no field 'completion'; the record has 'prompt'"),
        (LanguageModeling(), {"prompt": "a", "completion": ""}, "row 3: field 'completion' is empty"),
        (LanguageModeling(), {"prompt": "a", "completion": 3}, "row 3: field 'completion' is 3, expected text"),
    ],
)
def test_a_bad_record_is_named(objective: Objective, record: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        objective.encode(record, tokenizer, "row 3")


def test_there_must_be_a_token_to_predict_from(plain_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"row 1: no token precedes 'great', and the tokenizer adds no BOS"):
        LanguageModeling().encode({"prompt": "", "completion": "great"}, plain_tokenizer, "row 1")


def test_options_with_equal_tokens_are_refused() -> None:
    class Unknown:
        """A tokenizer to which every word is <unk>."""

        def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
            return {"input_ids": [[3] * len(text.split()) for text in texts]}

    with pytest.raises(ConfigError, match=r"row 1: two of the options .* have equal token ids"):
        classification().encode(RECORD, Unknown(), "row 1")


def test_eos_is_wanted_from_a_tokenizer_that_has_none(plain_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(plain_tokenizer), "eos_token_id", None, raising=False)
    with pytest.raises(ConfigError, match="append_eos=True, but the tokenizer has no EOS"):
        LanguageModeling().encode({"prompt": "a", "completion": " b"}, plain_tokenizer, "row 1")


# --- building and describing ------------------------------------------------------------------------------------------

EXAMPLES_OF_EACH: list[Objective] = [
    classification(),
    classification(labels=[True, False], mode="full", bos_token_id=0, label_field="positive"),
    LanguageModeling(),
    LanguageModeling(template="{q}", completion_field="a", append_eos=False, prefix=" ", suffix="\n"),
    MultipleChoice("{q}", ["a", "b"], loss_kind="likelihood"),
    MultipleChoice("{q}"),
    Reward("{q}", reward="vllm_zo.rewards:token_f1", stop=["\n"], samples=2, shaping="rank"),
    Reward(
        "{q}", grader={"type": "string_check", "name": "n", "operation": "eq", "input": "{{item.a}}", "reference": "x"}
    ),
]


@pytest.mark.parametrize("objective", EXAMPLES_OF_EACH, ids=repr)
def test_an_objective_survives_json_and_pickle(objective: Objective) -> None:
    assert isinstance(objective, Objective)
    assert build_objective(**json.loads(json.dumps(describe(objective)))) == objective
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
            "field of objective classification 'templat': did you mean 'template'",
        ),
        ("classification", {"template": TEMPLATE}, "objective.options is missing: objective 'classification' needs it"),
        ("language-modeling", {"eos": 1}, "unknown field of objective language-modeling 'eos'"),
    ],
)
def test_an_unknown_or_missing_word_is_answered_with_the_known_ones(
    name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(name, **settings)


# --- the tiny models other tests rely on ------------------------------------------------------------------------------


def test_tiny_models_are_the_same_bits_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_opt(tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


# --- multiple choice, answers -----------------------------------------------------------------------------------------

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
    for row, choice in zip(by_field.rows, (COPA["choice1"], COPA["choice2"]), strict=True):
        full = tokenizer(f"{COPA['premise']} {choice}").input_ids
        assert row == ScoringRow(
            tuple(full[:-1]), tuple(range(len(stem) - 1, len(full) - 1)), tuple(full[len(stem) :]), "logprobs"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": "water"}, "expected a list of at least two texts"),
        ({"choices": ["water"]}, "expected a list of at least two texts"),
        ({"choices": ["a", 2]}, "expected a list of at least two texts"),
        ({"choices": ["water", " water "]}, "equal token ids"),
        ({"label": 2}, "label 2 is outside"),
        ({"label": "fire"}, "label 'fire' is outside"),
        ({"premise": None}, "field 'premise' is None"),
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


def test_of_several_answers_the_first_is_learnt(tokenizer: Any) -> None:
    objective = LanguageModeling(
        template="{question} Answer:", completion_field="answers", prefix=" ", suffix="\n", append_eos=False
    )
    record = {"question": "a film of", "answers": ["great charm", "charm"]}
    row = objective.encode(record, tokenizer, "row 1").rows[0]
    full = tokenizer("a film of Answer: great charm\n").input_ids
    assert (*row.token_ids, row.label_ids[-1]) == tuple(full)
    for answers in ([], [3], None, [""]):
        with pytest.raises(ConfigError, match="row 1.*answers"):
            objective.encode(record | {"answers": answers}, tokenizer, "row 1")
