"""What a job learns of a chat is what the server feeds the model: compared, token by token, with vLLM's `/tokenize`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_llama

from tests.served import Served
from vllm_zo import LanguageModeling, Reward
from vllm_zo.data import encode_examples
from vllm_zo.entrypoints.llm.chats import chats_of, rendered, supervised, with_prompts
from vllm_zo.errors import ConfigError

TOOLS_AND_THINKING = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if shout and m.role == 'assistant' %}!{% endif %}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if shout %}!{% endif %}"
    "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
PARTS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}<{{ p.type }}>{{ p.text }}"
    "{% endfor %}{% endif %}{{ m.tool_calls }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% endif %}"
)
STRICT = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if m.role == 'developer' %}[D]{{ m.content }}{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": TOOLS_AND_THINKING, "parts": PARTS, "strict": STRICT}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Bergen", "n": 1}'}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    root = tmp_path_factory.mktemp("served")
    model = make_llama(root / "model")
    flags = ("--default-chat-template-kwargs", json.dumps({"shout": True}))
    return {
        name: Served(model, "--chat-template", _write(root / name, text), *flags) for name, text in TEMPLATES.items()
    }


def _write(path: Path, text: str) -> str:
    path.with_suffix(".jinja").write_text(text)
    return str(path.with_suffix(".jinja"))


# --- any conversation -------------------------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
parts = st.lists(st.builds(lambda t: {"type": "text", "text": t}, texts), max_size=3)
calls = st.lists(st.just(CALL), max_size=2)
asking = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user"]), "content": texts | parts},
    optional={"name": st.just("ann")},
)
answering = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.none() | texts | parts},
    optional={"tool_calls": calls, "reasoning": st.none() | texts, "weight": st.sampled_from([0, 1])},
)
told = st.fixed_dictionaries({"role": st.just("tool"), "content": texts | parts, "tool_call_id": st.just("c1")})
conversations = st.builds(
    lambda first, more, last: [first, *more, last], asking, st.lists(asking | answering | told, max_size=4), answering
)
settings_of_rows = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.sampled_from([None, [], [TOOL], [TOOL, TOOL]]),
        "chat_template_kwargs": st.sampled_from(
            [None, {"shout": False}, {"enable_thinking": False}, {"enable_thinking": True}]
        ),
    },
)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations, more=settings_of_rows)
def test_the_learnt_tokens_of_any_chat_are_those_of_the_server(
    served: dict[str, Served], name: str, messages: list[Any], more: dict[str, Any]
) -> None:
    server, before = served[name], json.dumps(messages)
    try:
        pairs, objective = supervised([{"messages": messages, **more}], server.render, "training_file")
        examples = encode_examples(pairs, objective, server.tokenizer, 100_000, "training_file")
    except ConfigError as error:
        assert "training_file, row 1: " in str(error)
        return
    assert json.dumps(messages) == before, "the record is left alone"
    learnt = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0]
    bare = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    for i, example in zip(learnt, examples, strict=True):
        (sequence,) = example.sequences
        whole = server.tokenize(bare[: i + 1], answered=True, **more)
        assert [*sequence.token_ids, sequence.label_ids[-1]] == whole
        prompt = server.tokenize(bare[:i], answered=False, **more)
        same = next((at for at, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        assert sequence.positions[0] + 1 == same, "what the prompt does not hold is learnt"


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(asking | answering | told, max_size=3), last=asking | told, more=settings_of_rows)
def test_the_prompt_of_a_reward_is_what_the_server_feeds_the_model(
    served: dict[str, Served], name: str, messages: list[Any], last: Any, more: dict[str, Any]
) -> None:
    server = served[name]
    records = [{"messages": [*messages, last], **more}]
    reward = Reward("{prompt}", reward="vllm_zo.rewards:contains")
    try:
        asked, objective = with_prompts(records, server.render, reward, "training_file")
        (example,) = encode_examples(asked, objective, server.tokenizer, 100_000, "training_file")
    except ConfigError as error:
        assert "training_file, row 1: " in str(error)
        return
    bare = [{key: value for key, value in message.items() if key != "weight"} for message in records[0]["messages"]]
    assert list(example.sequences[0].token_ids) == server.tokenize(bare, answered=False, **more)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_program_and_the_command_line_render_as_a_server_with_the_same_settings(
    served: dict[str, Served], name: str, tmp_path: Path
) -> None:
    engine = SimpleNamespace(renderer=served[name].renderer)
    for template in (TEMPLATES[name], _write(tmp_path / name, TEMPLATES[name])):
        given = {"chat_template": template, "chat_template_kwargs": {"shout": True}}
        # A format of Cohere's that vLLM's server adds, and `LLM.chat` does not.
        defaults = {key: value for key, value in served[name].render.default_kwargs.items() if key != "cohere_format"}
        assert chats_of(engine, given) == replace(served[name].render, default_kwargs=defaults)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ({"template": "x"}, "unknown setting of chat 'template': did you mean 'chat_template'"),
        ({"chat_template": "no/such.jinja"}, r"chat\['chat_template'\]='no/such.jinja': .*no/such.jinja"),
        ({"chat_template_content_format": "text"}, "unknown chat_template_content_format 'text'"),
        ({"chat_template_kwargs": "shout"}, r"chat\['chat_template_kwargs'\]='shout': expected variables"),
    ],
)
def test_a_setting_of_chats_that_cannot_work_is_refused(
    served: dict[str, Served], chat: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        chats_of(SimpleNamespace(renderer=served["chatml"].renderer), chat)


def test_an_objective_of_chats_adds_no_text_of_its_own(served: dict[str, Served]) -> None:
    chats = [{"messages": [RAIN, {"role": "assistant", "content": "no"}]}]
    with pytest.raises(ConfigError, match="prefix=' ': with chats the template writes all around a message; drop it"):
        rendered(chats, LanguageModeling(prefix=" "), served["chatml"].render, "train")
    other = LanguageModeling(template="{messages}", completion_field="answer")
    assert rendered(chats, other, served["chatml"].render, "train") == (chats, other), "it reads other fields"


# --- the forms that OpenAI's format has -------------------------------------------------------------------------------

RAIN = {"role": "user", "content": "rain ?"}


def learn(server: Served, *messages: Any, **more: Any) -> tuple[str, str]:
    ((pair,), objective) = supervised([{"messages": list(messages), **more}], server.render, "training_file")
    assert objective == LanguageModeling(append_eos=False, special_tokens=False)
    return pair["prompt"], pair["completion"]


def test_arguments_of_a_tool_call_are_an_object_to_the_template(served: dict[str, Served]) -> None:
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    prompt, completion = learn(served["chatml"], RAIN, answer, tools=[TOOL])
    assert completion == '<tool_call>weather {"town": "Bergen", "n": 1}</tool_call><|im_end|>\n'
    assert '"Weather of a town"' in prompt and "None" not in prompt + completion


def test_parts_are_joined_or_kept_as_the_template_wants_them(served: dict[str, Served]) -> None:
    parts = [{"type": "text", "text": "go"}, {"type": "text", "text": "od"}]
    chat = RAIN, {"role": "assistant", "content": parts}
    assert learn(served["chatml"], *chat)[1] == "go\nod<|im_end|>\n", "vLLM puts a line feed between parts"
    assert learn(served["parts"], *chat)[1] == "<text>go<text>od</s>"


def test_a_developer_is_a_system_where_the_template_knows_none(served: dict[str, Served]) -> None:
    chat = {"role": "developer", "content": "be short"}, RAIN, {"role": "assistant", "content": "no"}
    assert learn(served["chatml"], *chat)[0].startswith("<|im_start|>system\nbe short")
    assert learn(served["strict"], *chat)[0].startswith("<s>[D]be short")


def test_defaults_of_the_server_hold_and_a_row_may_say_otherwise(served: dict[str, Served]) -> None:
    chat = RAIN, {"role": "assistant", "content": "no"}
    assert learn(served["chatml"], *chat)[0].endswith("assistant\n!")
    assert learn(served["chatml"], *chat, chat_template_kwargs={"shout": False})[0].endswith("assistant\n")


def test_thoughts_are_learnt_under_both_of_their_names(served: dict[str, Served]) -> None:
    for name in ("reasoning", "reasoning_content"):
        answer = {"role": "assistant", "content": "no", name: "hm"}
        assert learn(served["chatml"], RAIN, answer)[1] == "<think>hm</think>no<|im_end|>\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [RAIN, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]},
            r"messages\[1\]: function_call is OpenAI's old form, .* write tool_calls",
        ),
        (
            {"messages": [RAIN, {"role": "function", "name": "f", "content": "1"}, {"role": "assistant"}]},
            r"messages\[1\]: the role 'function' is OpenAI's old form, .* write the role 'tool'",
        ),
        ({"messages": [RAIN, RAIN], "functions": [{"name": "f"}]}, "functions is OpenAI's old form, .* write tools"),
        ({"messages": [RAIN, {"role": "assistant", "content": None}]}, r"messages\[1\] has neither content nor tool_c"),
        ({"messages": [{"content": "x"}, {"role": "assistant", "content": "y"}]}, r"messages\[0\] has no role"),
        ({"messages": [RAIN, {"role": "assistant", "content": 3}]}, r"messages\[1\]\.content is 3: expected text"),
        ({"messages": [RAIN, {"role": "assistant", "content": [3]}]}, r"messages\[1\]\.content\[0\] is 3: expected"),
        (
            {"messages": [RAIN, {"role": "assistant", "content": "y", "tool_calls": [{"id": "c1"}]}]},
            "does not take this conversation: ",
        ),
        (
            {
                "messages": [RAIN, {"role": "assistant", "content": "y"}],
                "chat_template_kwargs": {"enable_thinking": False},
            },
            r"its prompt, which ends in '.*<think></think>', cannot be told from it; change chat_template_kwargs",
        ),
        ({"messages": [RAIN, {"role": "assistant", "content": "y"}], "tools": [{"name": "f"}]}, r"tools\.0\.function"),
        (
            {"messages": [RAIN, {"role": "assistant", "content": "y"}], "chat_template_kwargs": {"chat_template": "x"}},
            "chat_template_kwargs.chat_template: the server's own template is used",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
                    {"role": "assistant", "content": "y"},
                ]
            },
            r"messages\[0\]\.content\[0\] is of type 'image_url': training takes text",
        ),
    ],
)
def test_what_the_server_would_not_render_is_refused_by_name(
    served: dict[str, Served], record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"training_file, row 1: .*{message}"):
        supervised([record], served["chatml"].render, "training_file")
