"""Classification against naive float64 loops over examples and options, and against a real tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_opt
from transformers import AutoModelForCausalLM

from tests.objective_rows import (
    OPTIONS,
    RECORD,
    ROUNDING,
    TEMPLATE,
    classification,
    labels_row,
    logprobs_row,
    naive_classification,
    random_examples,
    score_rows,
)
from vllm_zo.errors import ConfigError
from vllm_zo.objectives import (
    Classification,
    EncodedExample,
    MultipleChoice,
    ScoringSequence,
    cell_offsets,
    flatten_sequences,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_opt(tmp_path_factory.mktemp("opt"))).eval()


@pytest.mark.parametrize("candidates", [2, 3, 6])
@pytest.mark.parametrize(
    "single", [[True] * 8, [False] * 8, [True, False, False, True] * 2], ids=["one-row", "rows", "mixed"]
)
def test_classification_loss_equals_a_naive_loop_over_examples(candidates: int, single: list[bool]) -> None:
    examples = random_examples(candidates, single)
    objective = classification(options=[f" w{i}" for i in range(candidates)])
    cells_PC = 3 * torch.randn(4, cell_offsets(examples)[-1], generator=torch.Generator().manual_seed(1))
    losses_PE, predictions_PE = objective.loss(cells_PC, examples)
    assert losses_PE.dtype == torch.float32 and predictions_PE.dtype == torch.int64
    for cells, losses, predictions in zip(cells_PC.double().tolist(), losses_PE, predictions_PE, strict=True):
        expected_losses, expected_predictions = naive_classification(cells, examples)
        torch.testing.assert_close(losses, torch.tensor(expected_losses, dtype=torch.float32), **ROUNDING)
        assert predictions.tolist() == expected_predictions


def test_choice_metrics_known_answers() -> None:
    examples = [EncodedExample((labels_row(3),), gold) for gold in (0, 0, 1, 2)]
    # class 0: tp 1, fn 1, fp 0; class 1: tp 1, fp 1; class 2: fn 1
    metrics = classification().metrics([0.0] * 4, [0, 1, 1, 1], examples)
    assert metrics == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 2 / 4 + 0) / 3)}
    ragged = [EncodedExample((logprobs_row(1),) * n, 0) for n in (2, 3)]
    assert MultipleChoice("{q}").metrics([0.0] * 2, [0, 1], ragged) == {"accuracy": 0.5}


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
    offsets = cell_offsets(examples)
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
    cells_PC = torch.randn(4, cell_offsets(examples)[-1])
    objective = classification(options=[" a", " b", " c"])
    on_device, _ = objective.loss(cells_PC.cuda(), examples)
    assert on_device.is_cuda
    torch.testing.assert_close(on_device.cpu(), objective.loss(cells_PC, examples)[0], **ROUNDING)


def test_single_token_options_need_one_row_scored_at_the_last_prompt_token(tokenizer: Any) -> None:
    encoded = classification().encode(RECORD, tokenizer, "row 1")
    prompt = tokenizer("a film of great charm It was").input_ids
    options = [tokenizer(option, add_special_tokens=False).input_ids[0] for option in OPTIONS]
    assert encoded == EncodedExample(
        (ScoringSequence(tuple(prompt), (len(prompt) - 1,), tuple(options), "labels"),), gold=1
    )


def test_longer_options_are_full_sequences_scored_at_their_own_tokens(tokenizer: Any) -> None:
    options = [" terrible", " great charm"]
    encoded = classification(options=options).encode(RECORD, tokenizer, "row 1")
    prompt = tokenizer("a film of great charm It was").input_ids
    for option, row in zip(options, encoded.sequences, strict=True):
        full = tokenizer("a film of great charm It was" + option).input_ids
        assert row.kind == "logprobs" and row.token_ids == tuple(full[:-1])
        assert row.label_ids == tuple(full[len(prompt) :]) and row.positions[0] == len(prompt) - 1
        assert [full[p + 1] for p in row.positions] == list(row.label_ids)


def test_a_boundary_that_merges_is_not_a_single_token(tokenizer: Any) -> None:
    """ " wa" + "s" is the token " was": prompt tokens and one more would be another text than prompt + option."""
    objective = Classification("{sentence} It wa", ["s", "nt"])
    encoded = objective.encode(RECORD, tokenizer, "row 1")
    merged = tokenizer("a film of great charm It was").input_ids
    assert [row.kind for row in encoded.sequences] == ["logprobs", "logprobs"]
    assert encoded.sequences[0].token_ids + encoded.sequences[0].label_ids[-1:] == tuple(merged)
    assert encoded.sequences[0].label_ids == (merged[-1],)
    with pytest.raises(ConfigError, match=r"row 1: option 's' is not a single token .* use mode='auto'"):
        Classification("{sentence} It wa", ["s", "nt"], mode="single-token").encode(RECORD, tokenizer, "row 1")


def test_a_prompt_that_splits_anew_before_an_option_is_not_a_single_token() -> None:
    """One token more than the prompt, but not the prompt's tokens: the logits at its end are of another text."""
    token_ids = {"dull It was": [5, 6], "dull It was a": [5, 7, 8], "dull It was b": [5, 6, 9]}

    def tokenizer(texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [token_ids[text] for text in texts]}

    objective = classification(options=[" a", " b"], bos_token_id=2)
    encoded = objective.encode({"sentence": "dull", "label": 0}, tokenizer, "row 1")
    assert encoded.sequences == (
        ScoringSequence((2, 5, 7), (1, 2), (7, 8), "logprobs"),
        ScoringSequence((2, 5, 6), (2,), (9,), "logprobs"),
    )


def test_single_token_and_full_scoring_agree_on_a_real_model(tokenizer: Any, model: Any) -> None:
    records = [
        {"sentence": s, "label": i % 2} for i, s in enumerate(["dull", "a quiet film", "nothing happens for two hours"])
    ]
    losses, predictions = [], []
    for mode in ("single-token", "full"):
        objective = classification(mode=mode)
        examples = [objective.encode(record, tokenizer, "row") for record in records]
        assert {row.kind for row in flatten_sequences(examples)} == {"labels" if mode == "single-token" else "logprobs"}
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


def test_prompts_start_as_the_tokenizer_starts_them_unless_bos_is_pinned(tokenizer: Any, plain_tokenizer: Any) -> None:
    def ids(tokenizer: Any, bos: int | None) -> tuple[int, ...]:
        return classification(bos_token_id=bos).encode(RECORD, tokenizer, "row 1").sequences[0].token_ids

    text = tuple(plain_tokenizer("a film of great charm It was").input_ids)
    assert ids(tokenizer, None) == (2, *text)
    assert ids(tokenizer, 0) == ids(plain_tokenizer, 0) == (0, *text)
    assert ids(plain_tokenizer, None) == text


def test_values_are_stripped_and_braces_in_them_mean_nothing(tokenizer: Any) -> None:
    record = {"sentence": "  {label} {0}\n", "stars": 4, "label": 0}
    encoded = Classification("{sentence} {{{stars}}} It was", OPTIONS).encode(record, tokenizer, "row 1")
    assert tokenizer.decode(encoded.sequences[0].token_ids) == "</s>{label} {0} {4} It was"


def test_an_empty_value_leaves_no_space_at_the_start_as_in_mezo(tokenizer: Any) -> None:
    encoded = classification().encode({"sentence": " ", "label": 0}, tokenizer, "row 1")
    assert list(encoded.sequences[0].token_ids) == tokenizer("It was").input_ids


def test_an_option_may_bring_the_space_or_the_template_may(tokenizer: Any) -> None:
    ours = classification().encode(RECORD, tokenizer, "row 1")
    assert Classification(TEMPLATE + " ", ["terrible", "great"]).encode(RECORD, tokenizer, "row 1") == ours


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
        (None, 1.0, 1),  # as pandas writes a column of whole numbers with a gap
        (None, "1.0", 1),
        ([1, 2], 2.0, 1),
        (["1", "2"], "2.0", 1),
        ([1.0, 2.0], 2, 1),
        ([0.5, 1.5], "1.50", 1),
        (["0.0", "1.0"], 1, 1),
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
        (None, None, r"row 7: field 'label' has no value \(None\); fill it in, or leave the row out"),
        (None, float("nan"), r"row 7: field 'label' has no value \(nan\)"),
        (None, [1], r"label \[1\] is outside"),
        (None, 0.5, r"label 0\.5 is outside"),
        (None, "0.5", r"label '0\.5' is outside"),
        (None, 2.0, r"label 2\.0 is outside"),
        (None, float("inf"), r"label inf is outside"),
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
        ({"labels": ["a", None]}, "labels=.*texts or numbers"),
        ({"label_field": 3}, "label_field=3: expected the name of a field"),
        ({"mode": "single"}, "unknown mode 'single': did you mean 'single-token'"),
        ({"bos_token_id": -1}, "bos_token_id=-1: expected an integer >= 0"),
        ({"bos_token_id": "<s>"}, "bos_token_id='<s>': expected an integer"),
    ],
)
def test_a_classification_that_cannot_work_is_refused_on_creation(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classification(**settings)


def test_options_with_equal_tokens_are_refused() -> None:
    class Unknown:
        """A tokenizer to which every word is <unk>."""

        def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
            return {"input_ids": [[3] * len(text.split()) for text in texts]}

    with pytest.raises(ConfigError, match=r"row 1: two of the options .* have equal token ids"):
        classification(bos_token_id=2).encode(RECORD, Unknown(), "row 1")
