"""A reward reads the text that a client would be given: compared with vLLM's output processor, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor

from tests.tokenizers_of import byte_fallback, byte_level, sentencepiece_like
from vllm_zo import Reward
from vllm_zo.engine.writing import Writing
from vllm_zo.objectives.base import Generation, ScoringSequence

KINDS: dict[str, Callable[[Path], Any]] = {
    "byte-level": byte_level, "byte-fallback": byte_fallback, "sentencepiece": sentencepiece_like,
}  # fmt: skip
ENDS = (2, 7)
"""</s>, and a token that only generation_config.json calls an end."""


class Kind:
    """A tokenizer, and what our engine and a client make of a completion with it."""

    def __init__(self, directory: Path, make: Callable[[Path], Any]) -> None:
        self.tokenizer = make(directory)
        self.writing = Writing(model_config(directory))

    def text(self, prompt: list[int], completion: list[int], stop: Sequence[str] = ()) -> str:
        generation = Generation(len(completion), None, None, (), tuple(stop))
        return self.writing.text(ScoringSequence(tuple(prompt), (), (), "generate", generation), completion)

    def to_client(self, prompt: list[int], completion: list[int], stop: list[str]) -> str:
        """What vLLM's front end gives out, fed with a token at a time as its engine does."""
        params = SamplingParams(
            max_tokens=len(completion), stop=stop, stop_token_ids=list(ENDS), output_kind=RequestOutputKind.FINAL_ONLY
        )
        processor = OutputProcessor(self.tokenizer, log_stats=False)
        request = EngineCoreRequest(
            request_id="r", external_req_id="r", prompt_token_ids=prompt, mm_features=None, sampling_params=params,
            pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
        )  # fmt: skip
        processor.add_request(request, None)
        for i, token in enumerate(completion):
            finish = FinishReason.STOP if token in ENDS else FinishReason.LENGTH if i + 1 == len(completion) else None
            given = processor.process_outputs([EngineCoreOutput("r", [token], finish_reason=finish)])
            if given.request_outputs:
                (output,) = given.request_outputs
                return str(output.outputs[0].text)
        raise AssertionError("the completion did not end")


def model_config(directory: Path, generation: dict[str, Any] | None = None, **sampling: Any) -> Any:
    return SimpleNamespace(
        tokenizer=str(directory),
        tokenizer_mode="auto",
        tokenizer_revision=None,
        trust_remote_code=False,
        get_diff_sampling_param=lambda: sampling,
        try_get_generation_config=lambda: {"eos_token_id": list(ENDS)} if generation is None else generation,
    )


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: Kind(root / name, make) for name, make in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_reward_reads_what_a_client_is_given(kinds: dict[str, Kind], name: str, data: st.DataObject) -> None:
    kind = kinds[name]
    tokens = st.integers(0, len(kind.tokenizer) - 1)
    prompt = data.draw(st.lists(tokens, min_size=1, max_size=6))
    body = data.draw(st.lists(tokens.filter(lambda token: token not in ENDS), max_size=10))
    completion = [*body, data.draw(tokens)]
    written = kind.tokenizer.decode(completion)
    at = data.draw(st.integers(0, max(len(written) - 1, 0)))
    stop = data.draw(st.sampled_from([[], [written[at : at + 2]], ["zz", written[at : at + 1]]]))
    stop = [text for text in stop if text]
    assert kind.text(prompt, completion, stop) == kind.to_client(prompt, completion, stop)


def test_the_first_space_is_read(kinds: dict[str, Kind]) -> None:
    for name in ("byte-fallback", "sentencepiece"):
        kind = kinds[name]
        prompt, whole = (kind.tokenizer(text)["input_ids"] for text in ("It was", "It was great"))
        assert kind.text(prompt, whole[len(prompt) :]) == " great"


def test_a_character_that_is_not_whole_is_left_out(kinds: dict[str, Kind]) -> None:
    kind = kinds["byte-level"]
    ids = kind.tokenizer("ok🎥", add_special_tokens=False)["input_ids"]
    assert kind.text([0], ids) == "ok🎥"
    assert kind.text([0], ids[:-1]) == "ok"
    assert "\ufffd" in kind.tokenizer.decode(ids[:-1]), "which decoding it alone shows"


def test_the_token_that_ended_a_completion_is_no_part_of_it(kinds: dict[str, Kind]) -> None:
    kind = kinds["byte-level"]
    text = kind.tokenizer.decode([7])
    assert kind.text([0], [20, 7]) + text == kind.text([0], [20, 7, 20]).removesuffix(kind.tokenizer.decode([20]))


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_a_member_ends_where_serving_ends(tmp_path: Path) -> None:
    byte_level(tmp_path)
    writing = Writing(model_config(tmp_path, {"eos_token_id": [2, 7, 9]}))
    params = writing.params(Generation(5, None, None, (11,)), seed=3)
    assert params.eos_token_id == 2 and sorted(params.stop_token_ids or ()) == [7, 9, 11]
    assert (params.max_tokens, params.seed) == (5, 3)
    assert params.skip_reading_prefix_cache
    of_base = writing.params(Generation(5, None, None, (11,)), seed=3, reads_prefix_cache=True)
    assert not of_base.skip_reading_prefix_cache
    plain = Writing(model_config(tmp_path, {})).params(Generation(5, None, None, ()), seed=3)
    assert plain.eos_token_id == 2 and plain.stop_token_ids == []


def test_what_an_objective_leaves_open_is_as_in_serving(tmp_path: Path) -> None:
    byte_level(tmp_path)
    config = model_config(tmp_path, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1, max_tokens=999)
    writing = Writing(config)
    params = writing.params(Generation(5, None, None, ()), seed=3)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.6, 0.9, 20, 1.1)
    assert params.max_tokens == 5
    params = writing.params(Generation(5, 1.0, 1.0, ()), seed=3)
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 20)
    greedy = writing.params(Generation(5, 0.0, None, ()), seed=3)
    assert greedy.seed is None and greedy.temperature == 0.0 and greedy.repetition_penalty == 1.1
    assert config.get_diff_sampling_param()["max_tokens"] == 999, "vLLM's own defaults are left alone"


def test_a_stop_text_of_one_token_ends_a_member_where_serving_would(kinds: dict[str, Kind]) -> None:
    tokenizer = kinds["byte-level"].tokenizer
    objective = Reward("{q}", reward="vllm_zo.rewards:contains", stop=[" great", "great great", "</s>"])
    (sequence,) = objective.encode({"q": "a"}, tokenizer, "row 1").sequences
    assert sequence.generation is not None
    expected = tuple(tokenizer(" great", add_special_tokens=False)["input_ids"])
    assert sequence.generation.stop_token_ids == expected, "a special token is no text of a completion"
