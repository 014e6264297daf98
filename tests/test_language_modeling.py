"""Language modelling: what is scored of a completion, its loss, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import make_opt
from transformers import AutoModelForCausalLM

from tests.objective_rows import ROUNDING, logprobs_row, naive_scores, score_rows
from vllm_zo.errors import ConfigError
from vllm_zo.objectives import (
    EncodedExample,
    LanguageModeling,
    cell_offsets,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_opt(tmp_path_factory.mktemp("opt"))).eval()


def test_language_modeling_loss_is_the_mean_nats_per_completion_token() -> None:
    examples = [EncodedExample((logprobs_row(n),)) for n in (1, 5, 3, 4)]
    cells_PC = -torch.rand(3, cell_offsets(examples)[-1], generator=torch.Generator().manual_seed(2))
    losses_PE, predictions_PE = LanguageModeling().loss(cells_PC, examples)
    expected = [[-scores[0] for scores in naive_scores(cells, examples)] for cells in cells_PC.double().tolist()]
    torch.testing.assert_close(losses_PE, torch.tensor(expected, dtype=torch.float32), **ROUNDING)
    naive = []
    for cells in cells_PC.tolist():
        naive.append([])
        for example in examples:
            n = len(example.sequences[0].label_ids)
            own, cells = cells[: 2 * n], cells[2 * n :]
            naive[-1].append(sum(not a >= b for a, b in zip(own[:n], own[n:], strict=True)))
    assert predictions_PE.tolist() == naive
    assert len({count for counts in naive for count in counts}) > 2


def test_a_completion_that_greedy_decoding_gives_is_right() -> None:
    cells = torch.tensor([[-0.5, -0.1, -0.5, -0.1], [-0.5, -0.2, -0.5, -0.1], [-0.5, torch.nan, -0.4, -0.1]])
    _, predictions = LanguageModeling().loss(cells, [EncodedExample((logprobs_row(2),))])
    assert predictions.tolist() == [[0], [1], [2]]


def test_completion_metrics_known_answers() -> None:
    examples = [EncodedExample((logprobs_row(n),)) for n in (1, 3)]
    metrics = LanguageModeling().metrics([2.0, 1.0], [0, 2], examples)
    assert metrics == {
        "accuracy": 0.5, "token_accuracy": pytest.approx(0.5), "perplexity": pytest.approx(math.exp(5 / 4)),
    }  # fmt: skip


def test_language_modeling_scores_the_completion_and_eos_and_nothing_else(tokenizer: Any, model: Any) -> None:
    objective = LanguageModeling()
    example = objective.encode({"prompt": "a quiet film", "completion": " It was great"}, tokenizer, "row 1")
    prompt = tokenizer("a quiet film").input_ids
    full = torch.tensor([*tokenizer("a quiet film It was great").input_ids, tokenizer.eos_token_id])
    assert len(example.sequences) == 1 and example.sequences[0].label_ids == tuple(full[len(prompt) :].tolist())
    with torch.no_grad():
        logits = model.double()(full[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[len(prompt) - 1 : -1], full[len(prompt) :])
    loss_PE, _ = objective.loss(score_rows(model, [example]), [example])
    torch.testing.assert_close(loss_PE[0, 0], expected, rtol=1e-10, atol=1e-10)


def test_language_modeling_without_eos_ends_with_the_completion(tokenizer: Any) -> None:
    objective = LanguageModeling(template="{q} It was", completion_field="a", append_eos=False)
    row = objective.encode({"q": " dull ", "a": " great"}, tokenizer, "row 1").sequences[0]
    assert tokenizer.decode(row.label_ids) == " great"
    assert row.token_ids == tuple(tokenizer("dull It was").input_ids)


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


def test_there_must_be_a_token_to_predict_from(plain_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"row 1: no token precedes 'great', and the tokenizer adds no BOS"):
        LanguageModeling().encode({"prompt": "", "completion": "great"}, plain_tokenizer, "row 1")


def test_eos_is_wanted_from_a_tokenizer_that_has_none(plain_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(plain_tokenizer), "eos_token_id", None, raising=False)
    with pytest.raises(ConfigError, match="append_eos=True, but the tokenizer has no EOS"):
        LanguageModeling().encode({"prompt": "a", "completion": " b"}, plain_tokenizer, "row 1")


def test_a_column_may_have_a_dot_in_its_name(tokenizer: Any) -> None:
    record = {"question": "who sang?", "answers.text": "the choir", "context.title": "A night"}
    dotted = LanguageModeling(template="{context.title} {question}", completion_field="answers.text", prefix=" ")
    plain = LanguageModeling(template="{a} {b}", completion_field="c", prefix=" ")
    expected = plain.encode({"a": "A night", "b": "who sang?", "c": "the choir"}, tokenizer, "row 1")
    assert dotted.encode(record, tokenizer, "row 1") == expected


def test_of_several_answers_the_first_is_learnt(tokenizer: Any) -> None:
    objective = LanguageModeling(
        template="{question} Answer:", completion_field="answers", prefix=" ", suffix="\n", append_eos=False
    )
    record = {"question": "a film of", "answers": ["great charm", "charm"]}
    row = objective.encode(record, tokenizer, "row 1").sequences[0]
    full = tokenizer("a film of Answer: great charm\n").input_ids
    assert (*row.token_ids, row.label_ids[-1]) == tuple(full)
    for answers in ([], [True], None, [""]):
        with pytest.raises(ConfigError, match="row 1.*answers"):
            objective.encode(record | {"answers": answers}, tokenizer, "row 1")


@pytest.mark.parametrize("completion", [" good", " good</s>"])
def test_a_completion_ends_once(completion: str, ending_tokenizers: tuple[Any, Any]) -> None:
    for tokenizer in ending_tokenizers:
        record = {"prompt": "say good:", "completion": completion}
        (sequence,) = LanguageModeling().encode(record, tokenizer, "row 1").sequences
        assert sequence.label_ids.count(2) == 1 and sequence.label_ids[-1] == 2
        for special in (True, False):
            objective = LanguageModeling(append_eos=False, special_tokens=special)
            (sequence,) = objective.encode(record, tokenizer, "row 1").sequences
            assert sequence.label_ids.count(2) == completion.count("</s>"), "as it is written"
