"""Turns chats, records with OpenAI's `messages`, into prompts and the completions to learn: for Python, the command
line and the server.

vLLM's own renderer renders chats, from the same request and with the same settings as `/v1/chat/completions`: a job
learns exactly the tokens that the server feeds the model. vLLM runs the template in a sandbox: a template can read the
messages, not the attributes of objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from jinja2.exceptions import TemplateError
from pydantic import ValidationError
from vllm.exceptions import VLLMError

from vllm_zo.compat import moved
from vllm_zo.entrypoints.llm.content_formats import CONTENT_FORMATS
from vllm_zo.errors import ConfigError
from vllm_zo.objectives import LanguageModeling, Objective, Preference, Reward
from vllm_zo.validation import check_keys, check_known, reject

Record = dict[str, Any]
Render = Callable[[list[Any], Record, bool], str]
"""(messages, the record they come from, add_generation_prompt) -> text."""

RENDERED = ("tools", "chat_template_kwargs", "documents", "reasoning_effort")
"""Fields of a record, beside `messages`, that decide how a chat is rendered. They are fields of a request as well."""
TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking")
ANSWERED = "{prompt}"
"""The template of a reward whose prompt a chat may be."""
TEMPLATE, CONTENT_FORMAT, KWARGS = "chat_template", "chat_template_content_format", "chat_template_kwargs"
OF_OPENAI = "preferred_output"
"""The field of the better answer in OpenAI's rows of preferences; the worse one has "non_" in front."""


@dataclass(frozen=True)
class ServedChats:
    """The chat rendering of a server.

    Args:
        renderer: the engine's renderer, an object of vLLM.
        template: the template of --chat-template; None: the tokenizer's own.
        content_format: the value of --chat-template-content-format.
        default_kwargs: the value of --default-chat-template-kwargs.
    """

    renderer: Any
    template: str | None = None
    content_format: str = CONTENT_FORMATS[0]
    default_kwargs: Mapping[str, Any] | None = None

    def __call__(self, messages: list[Any], record: Record, add_generation_prompt: bool) -> str:
        """The text that the server tokenises for a request with these messages.

        Raises:
            VLLMError, ValueError, TypeError, KeyError, TemplateError: vLLM or the template refuses the conversation.
        """
        given = {name: record[name] for name in RENDERED if record.get(name)}
        request = moved.find("ChatCompletionRequest").model_validate(
            # A copy: vLLM's validators edit the messages, and the next assistant message of the chat needs them too.
            deepcopy({"messages": messages, "add_generation_prompt": add_generation_prompt, **given})
        )
        tools = [tool.model_dump() for tool in request.tools] if request.tools else None
        defaults = {**(self.default_kwargs or {}), "tools": tools, "tokenize": False}
        # As vLLM's chat route: what the request says stands above these defaults.
        params = request.build_chat_params(self.template, self.content_format).with_defaults(
            {name: value for name, value in defaults.items() if value is not None}
        )
        _, prompt = self.renderer.render_messages(request.messages, params)
        if prompt.get("multi_modal_data"):
            raise ValueError("training takes text only; drop images, audio and video")
        if not isinstance(text := prompt.get("prompt"), str):
            raise ValueError("this model's chats are written as tokens, not text; give prompt and completion")
        return text


def chats_of(engine: Any, chat: Mapping[str, Any] | None) -> ServedChats:
    """The chat rendering of an engine in a program.

    Args:
        engine: vLLM's `LLMEngine` or `AsyncLLM`.
        chat: arguments of vLLM's `LLM.chat`: `chat_template` (a text or a file), `chat_template_content_format` and
            `chat_template_kwargs`. None, or what it leaves out: as `LLM.chat` without that argument.

    Raises:
        ConfigError: an argument is not one of these, or has a value that vLLM does not take.
    """
    given = dict(chat or {})
    check_keys("setting of chat", given, (TEMPLATE, CONTENT_FORMAT, KWARGS))
    if not isinstance(kwargs := given.get(KWARGS) or {}, Mapping):
        reject(f"chat[{KWARGS!r}]", kwargs, "variables of the template by name")
    content_format = given.get(CONTENT_FORMAT, CONTENT_FORMATS[0])
    check_known(CONTENT_FORMAT, content_format, CONTENT_FORMATS)
    try:
        template = moved.find("load_chat_template")(given.get(TEMPLATE))
    except (VLLMError, ValueError, OSError) as error:
        raise ConfigError(f"chat[{TEMPLATE!r}]={given[TEMPLATE]!r:.200}: {error}") from error
    return ServedChats(engine.renderer, template, content_format, kwargs)


def rendered(records: list[Record], objective: Objective, render: Render, name: str) -> tuple[list[Record], Objective]:
    """The records and the objective as the engine gets them: chats become texts where the objective reads texts.

    `LanguageModeling` of the fields `prompt` and `completion` learns the assistant's messages (`supervised`), a
    `Reward` for `{prompt}` asks for the next (`with_prompts`), and `Preference` compares two (`preferred`). Records
    without chats, and objectives that read other fields, stay as they are.

    Args:
        name: name of the data in error messages, e.g. "train.jsonl".

    Raises:
        ConfigError: the data mixes chats and prompts, or a chat cannot be rendered.
    """
    if isinstance(objective, Reward) and objective.template == ANSWERED:
        return with_prompts(records, render, objective, name)
    if isinstance(objective, LanguageModeling) and objective.reads_prompts:
        return supervised(records, render, name, objective)
    if isinstance(objective, Preference):
        return preferred(records, render, objective, name)
    return records, objective


def supervised(
    records: list[Record], render: Render, name: str, objective: LanguageModeling | None = None
) -> tuple[list[Record], Objective]:
    """Prompt and completion pairs, and the objective that learns them.

    A chat gives a pair for each of its assistant messages, except those with `"weight": 0`. The conversation before the
    message is the prompt. The job learns only the message itself and the end of message that the template writes. A
    chat is a record with `messages`, or with a `prompt` and a `completion` that are lists of messages (TRL's form), of
    which those of the completion are learnt.

    Args:
        name: name of the data in error messages, e.g. "training_file".
        objective: what the caller asked for; None: the default.

    Raises:
        ConfigError: the file mixes chats and prompts, a chat cannot be rendered, or the objective adds text to it.
    """
    objective = objective or LanguageModeling()
    if not _are_chats(records, name):
        return records, objective
    for option in ("prefix", "suffix"):
        if added := getattr(objective, option):
            raise ConfigError(f"{option}={added!r:.60}: with chats the template writes all around a message; drop it.")
    pairs = [
        pair for row, record in enumerate(records, start=1) for pair in _turns(record, render, f"{name}, row {row}")
    ]
    # The template has written special tokens and the end of the message: with a second set of them the job would learn
    # other tokens than the server feeds the model.
    return pairs, replace(objective, append_eos=False, special_tokens=False)


def with_prompts(records: list[Record], render: Render, objective: Reward, name: str) -> tuple[list[Record], Reward]:
    """Records with a `prompt` that the model shall answer, and the objective for them.

    A chat asks for its next assistant message: its rendering by the template becomes the `prompt`. Its other fields and
    `messages` stay, so that a grader can read them as {{ item.field }}. A `prompt` that is a list of messages (TRL's
    form) is a chat too, and becomes `messages`.

    Raises:
        ConfigError: the file mixes chats and prompts, or a chat also has a `prompt`, ends with the assistant's message,
            or cannot be rendered.
    """
    if not _are_chats(records, name):
        return records, objective
    asked = [_asked(record, render, f"{name}, row {row}") for row, record in enumerate(records, start=1)]
    return asked, replace(objective, special_tokens=False)


def preferred(
    records: list[Record], render: Render, objective: Preference, name: str
) -> tuple[list[Record], Preference]:
    """Prompts with a chosen and a rejected answer, and the objective that compares them.

    A record of chats has one of these forms, with the names that the objective's fields have:
        prompt, chosen, rejected                        lists of messages (TRL's explicit prompt)
        chosen, rejected                                whole chats that begin alike (TRL's implicit prompt)
        input, preferred_output, non_preferred_output   OpenAI's for `method.type="dpo"`

    Raises:
        ConfigError: the file mixes chats and texts, an answer is not one message of the assistant's, or a chat cannot
            be rendered.
    """
    chats = [OF_OPENAI in record or isinstance(record.get(objective.chosen_field), list) for record in records]
    if len(set(chats)) == 2:
        row = chats.index(not chats[0]) + 1
        raise ConfigError(f"{name}, row {row}: answers that are chats and answers that are texts are mixed; use one.")
    if not any(chats):
        return records, objective
    pairs = [_compared(record, render, objective, f"{name}, row {row}") for row, record in enumerate(records, start=1)]
    return pairs, Preference(beta=objective.beta, append_eos=False, special_tokens=False)


def _compared(record: Record, render: Render, objective: Preference, where: str) -> Record:
    """A record of chats as texts: prompt, chosen, rejected."""
    settings, names = record, (objective.chosen_field, objective.rejected_field)
    if OF_OPENAI in record:
        settings, names = _input(record, where), (OF_OPENAI, f"non_{OF_OPENAI}")
        before = _checked(settings.get("messages"), settings, "input.messages", where)
    elif isinstance(record.get(objective.prompt_field), list):
        before = _checked(record[objective.prompt_field], record, objective.prompt_field, where)
    else:
        before = []
    chosen, rejected = (_checked(record.get(name), settings, name, where) for name in names)
    if not before:
        while chosen and rejected and chosen[0] == rejected[0]:
            before.append(chosen.pop(0))
            del rejected[0]
    if not before:
        raise ConfigError(f"{where}: {names[0]} and {names[1]} begin with different messages: there is no prompt.")
    if not (chosen or rejected):
        raise ConfigError(f"{where}: {names[0]} and {names[1]} are equal; leave the row out.")
    for messages, field in zip((chosen, rejected), names, strict=True):
        if [message["role"] for message in messages] != ["assistant"]:
            raise ConfigError(
                f"{where}: {field} has {len(messages)} messages behind the prompt; expected one, the assistant's."
            )
        _check_said(messages[0], field, where)
    one, other = (_pair(before, messages[0], settings, render, where) for messages in (chosen, rejected))
    return {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}


def _input(record: Record, where: str) -> Record:
    if not isinstance(given := record.get("input"), Mapping):
        raise ConfigError(f'{where}: input is {given!r:.60}: expected {{"messages": [...]}}, the prompt.')
    return dict(given)


def _checked(messages: Any, settings: Record, name: str, where: str) -> list[Any]:
    """A list of messages without their `weight`, which no request has. Raises ConfigError: it is none."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise ConfigError(f"{where}: {name} must be a list of messages with role and content.")
    for i, message in enumerate(messages):
        _check_message(message, f"{where}: {name}[{i}]")
    _refuse_unserved(settings, messages, where, name)
    return [_bare(message) for message in messages]


def _asked(record: Record, render: Render, where: str) -> Record:
    messages = _messages(record, where)
    if not messages or messages[-1].get("role") == "assistant":
        raise ConfigError(f"{where}: the last message must be one to answer, e.g. the user's.")
    return {**record, "messages": messages, "prompt": _rendered(messages, record, True, render, where)}


def _has_chat_prompt(record: Record) -> bool:
    """Whether the `prompt` is a chat: TRL's conversational form."""
    return isinstance(record.get("prompt"), list) and "messages" not in record


def _are_chats(records: list[Record], name: str) -> bool:
    chats = ["messages" in record or _has_chat_prompt(record) for record in records]
    if len(set(chats)) == 2:
        row = chats.index(not chats[0]) + 1
        raise ConfigError(f"{name}, row {row}: chats (`messages`) and prompts are mixed; use one kind in a file.")
    return any(chats)


def _turns(record: Record, render: Render, where: str) -> list[Record]:
    messages, shown, field = _conversation(record, where)
    learnt = [
        i for i, m in enumerate(messages) if i >= shown and m.get("role") == "assistant" and m.get("weight", 1) != 0
    ]
    if not learnt:
        raise ConfigError(f"{where}: no assistant message to learn.")
    if learnt[0] == 0:
        raise ConfigError(f"{where}: the first message is the assistant's; put the user's in front of it.")
    for i in learnt:
        _check_said(messages[i], f"{field}[{i - shown}]", where)
    bare = [_bare(message) for message in messages]
    return [_pair(bare[:i], bare[i], record, render, where) for i in learnt]


def _conversation(record: Record, where: str) -> tuple[list[Any], int, str]:
    """The messages of a chat, how many of the first are shown and not learnt, and the field that has the others."""
    messages = _messages(record, where)
    if not _has_chat_prompt(record):
        return messages, 0, "messages"
    _checked(record.get("completion"), record, "completion", where)
    return [*messages, *record["completion"]], len(messages), "completion"


def _check_said(message: Mapping[str, Any], name: str, where: str) -> None:
    if not any(message.get(field) for field in ("content", "tool_calls", "reasoning", "reasoning_content")):
        raise ConfigError(f"{where}: {name} has neither content nor tool_calls: there is nothing to learn.")


def _bare(message: Mapping[str, Any]) -> Record:
    """The message as in a request that is served, which has no `weight`: a chat must be rendered as that request is."""
    return {key: value for key, value in message.items() if key != "weight"}


def _messages(record: Record, where: str) -> list[Any]:
    """The `messages` of a chat, or its `prompt` in TRL's form."""
    if _has_chat_prompt(record):
        return _checked(record["prompt"], record, "prompt", where)
    messages = record["messages"]
    if "prompt" in record:
        raise ConfigError(f"{where}: both messages and prompt; give one of them.")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ConfigError(f"{where}: messages must be a list of objects with role and content.")
    for i, message in enumerate(messages):
        _check_message(message, f"{where}: messages[{i}]")
    _refuse_unserved(record, messages, where, "messages")
    return messages


def _check_message(message: Mapping[str, Any], where: str) -> None:
    """Refuse a message without a role, or with content that is not text (plain or in parts). Raises ConfigError."""
    if not isinstance(message.get("role"), str):
        raise ConfigError(f"{where} has no role; write system, developer, user, assistant or tool.")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise ConfigError(f"{where}.content is {content!r:.60}: expected text, parts, or null.")
    for j, part in enumerate(content if isinstance(content, list) else ()):
        if not isinstance(part, Mapping):
            raise ConfigError(f'{where}.content[{j}] is {part!r:.60}: expected {{"type": "text", "text": "..."}}.')
        if part.get("type") not in TEXT_PARTS:
            raise ConfigError(f"{where}.content[{j}] is of type {part.get('type')!r}: training takes text only.")


def _refuse_unserved(record: Record, messages: list[Any], where: str, name: str) -> None:
    """Refuse what vLLM ignores without a word in a request: the job would learn another chat. Raises ConfigError."""
    if record.get("functions"):
        raise ConfigError(f"{where}: functions is OpenAI's old form, which the server does not render; write tools.")
    for i, message in enumerate(messages):
        if message.get("function_call"):
            old, new = "function_call", "tool_calls"
        elif message.get("role") == "function":
            old, new = "the role 'function'", "the role 'tool' with a tool_call_id"
        else:
            continue
        raise ConfigError(
            f"{where}: {name}[{i}]: {old} is OpenAI's old form, which the server does not render; write {new}."
        )
    if "chat_template" in (record.get("chat_template_kwargs") or {}):
        raise ConfigError(f"{where}: chat_template_kwargs.chat_template: the server's own template is used; drop it.")


def _rendered(messages: list[Any], record: Record, to_be_answered: bool, render: Render, where: str) -> str:
    try:
        return render(messages, record, to_be_answered)
    except ValidationError as error:
        raise ConfigError(f"{where}: the server does not take this conversation: {_said(error)}.") from error
    except (VLLMError, TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{where}: the chat template does not take this conversation: {error}") from error


def _said(error: ValidationError) -> str:
    """The field and the reason of a refusal. pydantic reports an error for every form that a message may have; the last
    is that of the most general form."""
    last = error.errors(include_url=False, include_context=False)[-1]
    field = ".".join(str(part) for part in last["loc"] if not str(part).endswith("Param"))
    return f"{field}={last.get('input')!r:.60}: {last['msg']}"


def _pair(before: list[Any], answer: Any, record: Record, render: Render, where: str) -> Record:
    prompt = _rendered(before, record, True, render, where)
    whole = _rendered([*before, answer], record, False, render, where)
    # Some templates open the reasoning in the prompt, or leave it out of an answer that is already there.
    if not whole.startswith(prompt):
        raise ConfigError(
            f"{where}: the chat template writes the conversation differently once the answer is there, so that its "
            f"prompt, which ends in {prompt[-40:]!r}, cannot be told from it; change chat_template_kwargs (such as "
            "enable_thinking), or give prompt and completion instead of messages."
        )
    return {"prompt": prompt, "completion": whole.removeprefix(prompt)}
