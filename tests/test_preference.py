"""Preferences: pairs of answers as tokens, their loss against a naive float64 DPO, and chats as pairs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_llama

from tests.served import Served
from tests.test_served_chats import TOOL, TOOLS_AND_THINKING
from vllm_zo import Preference
from vllm_zo.data import encode_examples
from vllm_zo.data.encode import encode_rows
from vllm_zo.entrypoints.llm.chats import rendered
from vllm_zo.errors import ConfigError
from vllm_zo.objectives import EncodedExample, ScoringSequence, cell_offsets

PAIR = {"prompt": "the film was", "chosen": " great", "rejected": " so terrible"}


def encoded(record: dict[str, Any], tokenizer: Any, **settings: Any) -> EncodedExample:
    return Preference(**settings).encode(record, tokenizer, "row 1")


def texts_of(example: EncodedExample, tokenizer: Any) -> list[tuple[str, str]]:
    """(what is read only, what is scored) of both answers."""
    return [
        (tokenizer.decode(s.token_ids[: s.positions[0] + 1]), tokenizer.decode(s.label_ids)) for s in example.sequences
    ]


# --- loss -------------------------------------------------------------------------------------------------------------


def pairs(lengths: list[tuple[int, int]]) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for both in lengths:
        answers = tuple(
            ScoringSequence(tuple(range(n + 2)), tuple(range(1, n + 1)), tuple(range(n)), "logprobs") for n in both
        )
        rows.append(EncodedExample(answers, reference=tuple((-3.0 * torch.rand(2, generator=generator)).tolist())))
    return rows


def test_the_loss_is_that_of_a_naive_dpo() -> None:
    examples = pairs([(1, 4), (3, 2), (5, 5), (400, 300)])
    cells_PC = -3 * torch.rand(4, cell_offsets(examples)[-1], generator=torch.Generator().manual_seed(1))
    losses_PE, predictions_PE = Preference(beta=0.2).loss(cells_PC, examples)
    assert losses_PE.dtype == torch.float32
    for cells, losses, predictions in zip(cells_PC.double().tolist(), losses_PE, predictions_PE, strict=True):
        for example, loss, prediction in zip(examples, losses.tolist(), predictions.tolist(), strict=True):
            logps = []
            for answer in example.sequences:
                logps.append(math.fsum(cells[: len(answer.label_ids)]))
                cells = cells[answer.num_cells :]
            chosen, rejected = (logp - of_base for logp, of_base in zip(logps, example.reference, strict=True))
            expected = math.log1p(math.exp(-0.2 * (chosen - rejected)))
            assert loss == pytest.approx(expected, rel=1e-7)
            assert prediction == (chosen <= rejected)


def test_two_probes_of_a_long_pair_keep_their_difference() -> None:
    """A sum of a thousand nats in float32 has a resolution of 6e-5: the slope of a small step would be lost."""
    (example,) = examples = [replace(pairs([(1000, 1000)])[0], reference=(-1000.0, -1000.0))]
    cells_PC = torch.full((2, cell_offsets(examples)[-1]), -1.0)
    cells_PC[0, 0] += 1e-6
    (one,), (other,) = Preference(beta=1.0).loss(cells_PC, [example])[0].double().tolist()
    assert other - one == pytest.approx(0.5e-6, rel=0.2)


def test_the_reference_is_the_sum_of_each_answers_scores() -> None:
    examples = pairs([(2, 1), (1, 1)])
    cells = [[-1.0, -2.0, 9.0, 9.0, -4.0, 9.0, -0.5, 9.0, -0.25, 9.0]]
    assert Preference().reference(torch.tensor(cells), examples) == [(-3.0, -4.0), (-0.5, -0.25)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_spoils_its_own_pair(bad: float) -> None:
    examples = pairs([(2, 3), (1, 2)])
    for cell in (0, 4):  # the first token of the chosen answer, and of the rejected one
        cells_PC = torch.full((1, cell_offsets(examples)[-1]), -1.0)
        cells_PC[0, cell] = bad
        losses_PE, predictions_PE = Preference().loss(cells_PC, examples)
        assert losses_PE.isfinite().tolist() == [[False, True]]
        assert not math.isnan(bad) or predictions_PE[0, 0] == 1


def test_equal_rewards_are_no_preference() -> None:
    examples = [replace(pairs([(1, 1)])[0], reference=(-1.0, -2.0))]
    losses_PE, predictions_PE = Preference().loss(torch.tensor([[-1.0, 0.0, -2.0, 0.0]]), examples)
    assert losses_PE.item() == pytest.approx(math.log(2)) and predictions_PE.item() == 1


def test_metrics_are_the_reward_accuracy_and_the_mean_margin() -> None:
    margins = [2.0, -3.0, 0.0, 60.0, -50.0]
    losses = [math.log1p(math.exp(-m)) for m in margins]
    metrics = Preference().metrics(losses, [0, 1, 1, 0, 1], pairs([(1, 1)] * 5))
    assert metrics == {"accuracy": pytest.approx(0.4), "margin": pytest.approx(sum(margins) / 5)}
    assert Preference().metrics([0.0], [0], pairs([(1, 1)]))["margin"] == 700.0
    assert Preference().metrics([1e4], [1], pairs([(1, 1)]))["margin"] == -1e4


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_pair_is_two_answers_behind_one_prompt(tokenizer: Any) -> None:
    example = encoded(PAIR, tokenizer)
    assert texts_of(example, tokenizer) == [
        ("</s>the film was", " great</s>"), ("</s>the film was", " so terrible</s>")
    ]  # fmt: skip
    assert example.gold == 0 and example.num_candidates == 2 and example.reference is None
    bare = encoded(PAIR, tokenizer, append_eos=False, special_tokens=False)
    assert texts_of(bare, tokenizer) == [("the film was", " great"), ("the film was", " so terrible")]


def test_an_implicit_prompt_is_what_the_answers_have_in_common(tokenizer: Any) -> None:
    whole = {name: PAIR["prompt"] + PAIR[name] for name in ("chosen", "rejected")}
    assert encoded(whole, tokenizer) == encoded(PAIR, tokenizer)
    renamed = {"question": PAIR["prompt"], "good": PAIR["chosen"], "bad": PAIR["rejected"], "source": "x"}
    fields = {"prompt_field": "question", "chosen_field": "good", "rejected_field": "bad"}
    assert encoded(renamed, tokenizer, **fields) == encoded(PAIR, tokenizer)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": " b"}, "row 1: no field 'rejected'; the record has 'prompt', 'chosen'"),
        ({"prompt": "a", "chosen": " b", "rejected": None}, "row 1: field 'rejected' has no value"),
        ({"prompt": "a", "chosen": " b", "rejected": " b"}, "row 1: 'chosen' and 'rejected' have equal tokens"),
        ({"chosen": "a b", "rejected": "a b"}, "row 1: 'chosen' and 'rejected' have equal tokens"),
        ({"prompt": ["a"], "chosen": " b", "rejected": " c"}, "row 1: field 'prompt' is ['a'], expected text"),
    ],
)
def test_a_bad_pair_is_named(record: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        encoded(record, tokenizer)


@pytest.mark.parametrize("beta", [0, -1, "x", math.nan, True])
def test_a_beta_that_is_no_positive_number_is_refused(beta: Any) -> None:
    with pytest.raises(ConfigError, match="beta"):
        Preference(beta=beta)


def test_pairs_that_are_too_long_are_refused_dropped_or_cut_at_their_common_prompt(tokenizer: Any) -> None:
    rows = [PAIR, PAIR | {"prompt": "a film of great charm and a great cast . " * 4}]
    longest = max(len(s.token_ids) for s in encoded(rows[0], tokenizer).sequences)

    def kept(on_long: Any) -> Any:
        return encode_rows(rows, Preference(), tokenizer, longest + 1, "rows", on_long=on_long)

    assert [message.split(":")[0] for message in kept("error").refused] == ["rows, row 2"]
    assert kept("drop").dropped == [2] and len(kept("drop").examples) == 1
    _, cut = kept("truncate-left").examples
    (one, chosen), (other, rejected) = texts_of(cut, tokenizer)
    assert one == other and one.startswith("</s>") and rows[1]["prompt"].endswith(one.removeprefix("</s>"))
    assert (chosen, rejected) == (" great</s>", " so terrible</s>")


# --- chats ------------------------------------------------------------------------------------------------------------

ASKED = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "was it great ?"}]
GOOD, BAD = {"role": "assistant", "content": "it was great"}, {"role": "assistant", "content": "no"}
FORMS: dict[str, dict[str, Any]] = {
    "TRL, explicit": {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD], "tools": [TOOL]},
    "TRL, implicit": {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD], "tools": [TOOL], "score": 1},
    "a text beside the chats": {"prompt": "?", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD], "tools": [TOOL]},
    "OpenAI": {
        "input": {"messages": ASKED, "tools": [TOOL], "parallel_tool_calls": True},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp("served")
    template = root / "template.jinja"
    template.write_text(TOOLS_AND_THINKING)
    return Served(make_llama(root / "model"), "--chat-template", str(template))


@pytest.mark.parametrize("form", FORMS)
def test_the_tokens_of_a_pair_of_chats_are_those_of_the_server(served: Served, form: str) -> None:
    before = json.dumps(FORMS[form])
    records, objective = rendered([FORMS[form]], Preference(beta=0.3), served.render, "train")
    assert json.dumps(FORMS[form]) == before, "the record is left alone"
    assert objective.beta == 0.3
    (example,) = encode_examples(records, objective, served.tokenizer, 100_000, "train")
    prompt = served.tokenize(ASKED, answered=False, tools=[TOOL])
    for answer, sequence in zip((GOOD, BAD), example.sequences, strict=True):
        whole = served.tokenize([*ASKED, answer], answered=True, tools=[TOOL])
        assert [*sequence.token_ids, sequence.label_ids[-1]] == whole
        assert whole[: len(prompt)] == prompt and sequence.positions[0] + 1 == len(prompt)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([FORMS["OpenAI"], PAIR], "train, row 2: answers that are chats and answers that are texts are mixed"),
        ([FORMS["OpenAI"] | {"input": "hello"}], "train, row 1: input is 'hello': expected"),
        ([FORMS["OpenAI"] | {"input": {}}], "train, row 1: input.messages must be a list of messages"),
        ([FORMS["OpenAI"] | {"non_preferred_output": []}], "row 1: non_preferred_output must be a list of messages"),
        (
            [FORMS["OpenAI"] | {"preferred_output": ASKED}],
            "preferred_output has 2 messages behind the prompt",
        ),
        ([{"chosen": [GOOD], "rejected": [BAD]}], "chosen and rejected begin with different messages: there is no"),
        ([{"chosen": [*ASKED, GOOD], "rejected": [*ASKED, GOOD]}], "row 1: chosen and rejected are equal"),
        ([{"chosen": [*ASKED, GOOD], "rejected": ASKED}], "rejected has 0 messages behind the prompt; expected one"),
        ([{"chosen": [*ASKED, GOOD, ASKED[1], GOOD], "rejected": [*ASKED, BAD]}], "chosen has 3 messages behind"),
        ([{"prompt": ASKED, "chosen": [{"role": "assistant"}], "rejected": [BAD]}], "chosen has neither content nor"),
        ([{"prompt": ASKED, "chosen": [GOOD], "rejected": [{"content": "x"}]}], "rejected[0] has no role"),
        ([{"prompt": ASKED, "chosen": [GOOD], "rejected": "x"}], "rejected must be a list of messages"),
        (
            [{"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD | {"function_call": {"name": "x"}}]}],
            "rejected[0]: function_call is OpenAI's old form",
        ),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], "chosen": [GOOD], "rejected": [BAD]}],
            "prompt[0].content[0] is of type 'image_url': training takes text only",
        ),
    ],
)
def test_a_bad_pair_of_chats_is_named(served: Served, records: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        rendered(records, Preference(), served.render, "train")


def test_texts_stay_as_they_are(served: Served, tmp_path: Path) -> None:
    objective = Preference(chosen_field="good")
    assert rendered([PAIR], objective, served.render, "train") == ([PAIR], objective)
