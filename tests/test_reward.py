"""The reward objective without an engine: settings, encoding, shaping, functions and graders, built-in metrics."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from vllm_zo import Reward, RewardError
from vllm_zo.data import encode_examples
from vllm_zo.errors import ConfigError
from vllm_zo.objectives import EncodedExample, ScoringSequence, Trust
from vllm_zo.objectives.base import Generation
from vllm_zo.objectives.reward_function import build_reward, load_function, name_of
from vllm_zo.objectives.rewards import REWARDS, contains, exact_match, token_f1
from vllm_zo.objectives.shaping import SHAPINGS, shape

EXACT = {
    "type": "string_check", "name": "exact", "operation": "eq",
    "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
}  # fmt: skip
PYTHON = {"type": "python", "name": "p", "source": "def grade(sample, item): return 1.0"}
RECORD = {"sentence": " a film of great charm ", "answer": "great", "year": 1999}


def length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_an_example_is_its_prompt_and_what_the_reward_may_read(tokenizer: Any) -> None:
    objective = Reward("{sentence} It was", reward=length, max_tokens=5, samples=2, stop=["\n", "the end"], top_p=0.9)
    encoded = objective.encode(RECORD, tokenizer, "row 1")
    prompt = "a film of great charm It was"
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    stops = tuple(newline) if len(newline) == 1 else ()
    row = ScoringSequence(
        tuple(tokenizer(prompt).input_ids), (), (), "generate", Generation(5, None, 0.9, stops, objective.stop)
    )
    assert encoded == EncodedExample((row, row), columns={**RECORD, "prompts": prompt})
    assert row.num_cells == 1 and row.max_new_tokens == 5


def test_prompt_and_completion_must_fit_into_the_model(tokenizer: Any) -> None:
    objective = Reward("{sentence}", reward=length, max_tokens=100)
    with pytest.raises(ConfigError, match=r"limit is 28 \(max_model_len=128 less max_tokens=100\)"):
        encode_examples([{"sentence": "a film " * 20}], objective, tokenizer, 128, "rows")


@pytest.mark.parametrize(
    ("settings", "record", "message"),
    [
        ({"reward": length}, {"text": "x"}, "row 3: no field 'sentence'"),
        ({"reward": length}, {"sentence": "x", "prompts": "y"}, "row 3: field 'prompts' has a name that rewards use"),
        ({"grader": EXACT}, {"sentence": "x"}, "row 3: no field 'answer', which grader 'exact' reads"),
    ],
)
def test_a_record_that_cannot_be_scored_is_named(
    tokenizer: Any, settings: dict[str, Any], record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Reward("{sentence}", **settings).encode(record, tokenizer, "row 3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "reward, grader: give exactly one of the two"),
        ({"reward": length, "grader": EXACT}, "reward, grader: give exactly one of the two"),
        (
            {"reward": "length"},
            "unknown reward 'length': Known: contains, exact_match, token_f1. Or 'module:function",
        ),
        ({"reward": 3}, "reward=3: expected a function"),
        ({"grader": {**EXACT, "operation": "is"}}, "unknown grader.operation 'is'"),
        ({"reward": length, "max_tokens": 0}, "max_tokens=0"),
        ({"reward": length, "temperature": -1}, "temperature=-1"),
        ({"reward": length, "top_p": 0}, "top_p=0"),
        ({"reward": length, "top_p": 1.5}, "top_p=1.5"),
        ({"reward": length, "samples": 0}, "samples=0"),
        ({"reward": length, "samples": 2, "temperature": 0.0}, "all completions are the same"),
        ({"reward": length, "shaping": "z-score"}, "unknown shaping 'z-score': did you mean 'zscore'"),
        ({"reward": length, "stop": "\n"}, "stop='\\n': expected a list"),
        ({"reward": length, "stop": [""]}, "stop=['']"),
        ({"reward": length, "timeout_s": 0}, "timeout_s=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Reward("{sentence}", **settings)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_the_loss_is_minus_the_shaped_mean_of_the_samples(shaping: str) -> None:
    generator = torch.Generator().manual_seed(0)
    probes, examples, samples = 6, 3, 2
    cells = torch.rand(probes, examples * samples, generator=generator)
    cells[2] = cells[4]  # a tie
    row = ScoringSequence((1,), (), (), "generate", Generation(1, 1.0, 1.0, ()))
    objective = Reward("{q}", reward=length, samples=samples, shaping=shaping, pass_reward=0.5)
    losses, predictions = objective.loss(cells, [EncodedExample((row,) * samples)] * examples)
    for e in range(examples):
        rewards = [cells[p, e * samples : (e + 1) * samples].double().mean().item() for p in range(probes)]
        mean = sum(rewards) / probes
        spread = (sum((r - mean) ** 2 for r in rewards) / probes) ** 0.5
        expected = {
            "none": rewards,
            "baseline": [r - mean for r in rewards],
            "zscore": [(r - mean) / spread for r in rewards],
            "rank": [
                (sum(o < r for o in rewards) + (sum(o == r for o in rewards) - 1) / 2) / (probes - 1) - 0.5
                for r in rewards
            ],
        }[shaping]
        assert losses[:, e].tolist() == pytest.approx([-x for x in expected], abs=1e-5)
        assert predictions[:, e].tolist() == [int(r < 0.5) for r in rewards]


def test_a_prompt_on_which_all_probes_agree_has_no_say() -> None:
    for shaping in ("baseline", "zscore", "rank"):
        assert shape(torch.full((4, 2), 0.25), shaping).abs().max() == 0.0


def test_an_evaluation_keeps_its_rewards_whatever_the_shaping() -> None:
    for shaping in SHAPINGS:
        assert shape(torch.tensor([[0.25, 1.0]]), shaping).tolist() == [[0.25, 1.0]]
    objective = Reward("{q}", reward=length)
    assert objective.metrics([-0.5, -1.0], [1, 0], []) == {"accuracy": 0.5, "reward": 0.75}


# --- functions --------------------------------------------------------------------------------------------------------


def test_a_function_is_kept_as_its_name_and_found_again() -> None:
    assert Reward("{q}", reward=length).reward == f"{__name__}:length"
    assert load_function(f"{__name__}:length") is length
    local = [lambda completions: [1.0] * len(completions)][0]
    name = name_of(local)
    assert name.startswith("local:") and name == name_of(local) and load_function(name) is local
    described = json.loads(json.dumps(Reward("{q}", reward=local).reward))
    assert load_function(described) is local


def test_a_function_gets_the_columns_it_has_parameters_for() -> None:
    columns = {"answer": ["a", "b"], "year": [1, 2], "prompts": ["p", "q"]}
    seen: list[dict[str, Any]] = []

    def everything(completions: list[str], **columns: Any) -> list[float]:
        seen.append({"completions": completions, **columns})
        return [0.0, 1.0]

    def some(prompts: list[str], completions: list[str], year: list[int]) -> list[int]:
        seen.append({"prompts": prompts, "completions": completions, "year": year})
        return [0, True]

    assert build_reward(name_of(everything), None)(["x", "y"], columns) == [0.0, 1.0]
    assert build_reward(name_of(some), None)(["x", "y"], columns) == [0.0, 1.0]
    assert seen[0] == {"completions": ["x", "y"], **columns}
    assert seen[1] == {"completions": ["x", "y"], "prompts": ["p", "q"], "year": [1, 2]}


def test_arrays_are_numbers_too() -> None:
    assert build_reward(name_of(lambda completions: torch.tensor([0.5, 2.0])), None)(["x", "y"], {}) == [0.5, 2.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "returned 1 numbers for 2 completions"),
        (1.0, "expected a list of 2 numbers"),
        (None, "expected a list of 2 numbers"),
        ([1.0, None], "expected a list of 2 numbers"),
        ([1.0, "much"], "expected a list of 2 numbers"),
        ([1.0, float("nan")], "is nan for completion 'y'"),
        ([float("inf"), 1.0], "is inf for completion 'x'"),
    ],
)
def test_an_answer_that_is_no_list_of_finite_numbers_is_refused(answer: Any, message: str) -> None:
    with pytest.raises(RewardError, match=re.escape(message)):
        build_reward(name_of(lambda completions: answer), None)(["x", "y"], {})


def test_what_a_function_raises_is_told() -> None:
    def broken(completions: list[str], **columns: Any) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(RewardError, match="raised KeyError: 'answer'"):
        build_reward(name_of(broken), None)(["x"], {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "cannot be imported: No module named 'no_such_module'"),
        ("vllm_zo.objectives.rewards:no_such", "cannot be imported"),
        ("math:pi", "is float: expected a function"),
        ("vllm_zo.objectives.reward:build_reward", "defined in vllm_zo.objectives.reward_function: name it by that"),
        ("local:gone-7", "is a function of another process"),
    ],
)
def test_a_function_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Reward("{q}", reward=name).scorer()


# --- graders ----------------------------------------------------------------------------------------------------------


def test_a_grader_scores_against_the_columns() -> None:
    score = Reward("{q}", grader=EXACT).scorer()
    assert score(["yes", "no"], [{"answer": "yes"}, {"answer": "yes"}]) == [1.0, 0.0]


def test_an_output_that_is_not_the_json_it_should_be_is_worth_0_and_other_failures_fail() -> None:
    spec = {**EXACT, "input": "{{sample.output_json.a}}"}
    assert build_reward(None, spec)(['{"a": "x"}', "x"], {"answer": ["x", "x"]}) == [1.0, 0.0]
    with pytest.raises(RewardError, match="grader 'exact' failed on completion 'x': invalid_variable_error"):
        build_reward(None, EXACT)(["x"], {"other": ["x"]})


def test_a_registered_reward_goes_by_its_name() -> None:
    assert name_of(token_f1) == "token_f1" and load_function("token_f1") is token_f1
    assert Reward("{q}", reward=contains) == Reward("{q}", reward="contains")
    assert list(REWARDS)[:3] == ["exact_match", "contains", "token_f1"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("token_f2", "unknown reward 'token_f2': did you mean 'token_f1'?"),
        (
            "vllm_zo.objectives.rewards:re.enum.sys.exit",
            "expected 'module:function', with a function that the module",
        ),
        ("m:", "expected 'module:function'"),
        (3, "expected a function, its name as"),
        ("", "expected a function, its name as"),
    ],
)
def test_a_name_that_is_no_reward_is_refused_at_once(name: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Reward("{q}", reward=name)


def test_what_a_reward_must_be_trusted_with() -> None:
    multi = {"type": "multi", "name": "m", "graders": {"p": PYTHON}, "calculate_output": "p"}
    settings: list[tuple[dict[str, Any], Trust]] = [
        ({"reward": length}, Trust.IMPORTS),
        ({"reward": "os:system"}, Trust.IMPORTS),
        ({"reward": lambda completions, **columns: [0.0]}, Trust.IMPORTS),
        ({"grader": PYTHON}, Trust.SOURCE),
        ({"grader": multi}, Trust.SOURCE),
        ({"reward": token_f1}, Trust.NAMES),
        ({"grader": EXACT}, Trust.NAMES),
    ]
    for given, expected in settings:
        assert Reward("{q}", **given).trust == expected, given


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answers", "em", "f1", "found"),
    [
        ("The Eiffel Tower.", ["Eiffel tower"], 1.0, 1.0, 1.0),
        ("It is the Eiffel Tower", ["Eiffel Tower", "Paris"], 0.0, 2 * 2 / (4 + 2), 1.0),
        ("Paris Paris", "paris", 0.0, 2 / 3, 1.0),
        ("Lyon", ["Paris"], 0.0, 0.0, 0.0),
        ("", ["Paris"], 0.0, 0.0, 0.0),
        ("The", ["a"], 1.0, 1.0, 1.0),
    ],
)
def test_answer_metrics_known_answers(text: str, answers: Any, em: float, f1: float, found: float) -> None:
    assert exact_match([text], [answers], prompts=["x"]) == [em]
    assert token_f1([text], [answers]) == [pytest.approx(f1)]
    assert contains([text], [answers]) == [found]
