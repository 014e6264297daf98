"""Training records as OpenAI knows them, turned into a prompt and the completion to learn.

Chats go through the model's own chat template, which transformers renders in a sandbox: a template can read the
messages, not the attributes of objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jinja2.exceptions import TemplateError

from vllm_zo.errors import ConfigError
from vllm_zo.objectives import LanguageModeling, Objective, Reward

Record = dict[str, Any]
Template = Callable[[list[Any], list[Any] | None, bool], str]
"""(messages, tools, add_generation_prompt) -> text."""


def chat_template(tokenizer: Any, template: str | None) -> Template:
    """The template that the server answers chats with.

    Args:
        template: what --chat-template says; None: the tokenizer's own.
    """

    def render(messages: list[Any], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return text

    return render


def supervised(records: list[Record], render: Template, name: str) -> tuple[list[Record], Objective]:
    """Prompt and completion pairs, and the objective that learns them.

    A chat gives a pair for each of its assistant messages (those with `"weight": 0` excepted): the conversation before
    it is the prompt, and only the message itself, with what the template ends it with, is learnt.

    Args:
        name: what messages call the data, e.g. "training_file".

    Raises:
        ConfigError: a record that is neither kind, both kinds in one file, or a chat that cannot be rendered.
    """
    if not _are_chats(records, name):
        return records, LanguageModeling()
    pairs = [
        pair for row, record in enumerate(records, start=1) for pair in _turns(record, render, f"{name}, row {row}")
    ]
    return pairs, LanguageModeling(append_eos=False, special_tokens=False)


def with_prompts(records: list[Record], render: Template, objective: Reward, name: str) -> tuple[list[Record], Reward]:
    """Records whose `prompt` is to be answered, and the objective for them.

    A chat is asked for its next assistant message: the template's rendering becomes its `prompt`. Its other fields
    (and `messages`) stay, for the grader to read as {{ item.field }}.

    Raises:
        ConfigError: a record that is neither kind, both kinds in one file, or a chat that cannot be rendered.
    """
    if not _are_chats(records, name):
        return records, objective
    asked = [_asked(record, render, f"{name}, row {row}") for row, record in enumerate(records, start=1)]
    return asked, replace(objective, special_tokens=False)


def _asked(record: Record, render: Template, where: str) -> Record:
    if "prompt" in record:
        raise ConfigError(f"{where}: both messages and prompt; give one of them.")
    messages = _messages(record, where)
    if not messages or messages[-1].get("role") == "assistant":
        raise ConfigError(f"{where}: the last message must be one to answer, e.g. the user's.")
    return {**record, "prompt": _rendered(messages, record.get("tools"), True, render, where)}


def _are_chats(records: list[Record], name: str) -> bool:
    chats = ["messages" in record for record in records]
    if len(set(chats)) == 2:
        row = chats.index(not chats[0]) + 1
        raise ConfigError(f"{name}, row {row}: chats (`messages`) and prompts are mixed; use one kind in a file.")
    return any(chats)


def _turns(record: Record, render: Template, where: str) -> list[Record]:
    messages, tools = _messages(record, where), record.get("tools")
    learnt = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and m.get("weight", 1) != 0]
    if not learnt:
        raise ConfigError(f"{where}: no assistant message to learn.")
    if learnt[0] == 0:
        raise ConfigError(f"{where}: the first message is the assistant's; put the user's in front of it.")
    bare = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return [_pair(bare[:i], bare[i], tools, render, where) for i in learnt]


def _messages(record: Record, where: str) -> list[Any]:
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ConfigError(f"{where}: messages must be a list of objects with role and content.")
    return messages


def _rendered(messages: list[Any], tools: Any, to_be_answered: bool, render: Template, where: str) -> str:
    try:
        return render(messages, tools, to_be_answered)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{where}: the chat template does not take this conversation: {error}") from error


def _pair(before: list[Any], answer: Any, tools: list[Any] | None, render: Template, where: str) -> Record:
    prompt = _rendered(before, tools, True, render, where)
    whole = _rendered([*before, answer], tools, False, render, where)
    if not whole.startswith(prompt):
        raise ConfigError(
            f"{where}: the chat template writes the conversation differently once the answer is there, so that its "
            "prompt cannot be told from it; give prompt and completion instead of messages."
        )
    return {"prompt": prompt, "completion": whole.removeprefix(prompt)}
