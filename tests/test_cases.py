"""Small inputs as people have them, through every road to a job: Python, the command line and the server.

Each is learnt as it is meant, or refused with the row, the field, the value and the way out, and alike on every road.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.cli import use_engine, vllm_zo
from tests.engines import Engines
from tests.served import Served
from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.jobs.prepare import Preparer
from vllm_zo.entrypoints.server.keys.limits import Quotas
from vllm_zo.entrypoints.server.settings import ServerSettings
from vllm_zo.entrypoints.server.state.directory import StateDir
from vllm_zo.entrypoints.server.state.files import Files
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.entrypoints.server.state.store import Store
from vllm_zo.errors import ZOError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives import OBJECTIVES
from vllm_zo.objectives.base import EncodedExample

Objective = Mapping[str, Any]
SENTIMENT = {"name": "classification", "template": "{sentence} It was", "options": [" terrible", " great"]}
PROMPTS = {"name": "language-modeling"}
CHOICES = {"name": "multiple-choice", "template": "{question} Answer:", "choices": "choices", "label_field": "answer"}
FLAT = {"name": "language-modeling", "template": "{context.title} {question}", "completion_field": "answers.text"}
CHATML = (
    "{% if tools %}<tools>{{ tools | length }}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Bergen"}'}}
ASKED = {"role": "user", "content": "rain ?"}
NO = {"role": "assistant", "content": "no"}
GOOD = {"sentence": "a row", "label": 1}
MARK = "\ufeff".encode()


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def chat(*messages: Any, **more: Any) -> bytes:
    return lines({"messages": list(messages), **more})


REFUSED: dict[str, tuple[bytes, Objective, str]] = {
    "half a character": (
        lines(GOOD, {"sentence": "what a day \ud83d", "label": 1}),
        SENTIMENT,
        r"line 2, field 'sentence': .*U\+D83D.*position 11",
    ),
    "a missing text": (lines(GOOD, {"sentence": float("nan"), "label": 0}), SENTIMENT,
        r"row 2: field 'sentence' has no value \(nan\); fill it in, or leave the row out"),
    "a missing label": (lines({"sentence": "a", "label": None}), SENTIMENT,
        r"row 1: field 'label' has no value \(None\); fill it in, or leave the row out"),
    "a label outside the options": (lines(GOOD, {"sentence": "a", "label": 2}), SENTIMENT, r"row 2: .*label.* 2"),
    "a label between two": (lines({"sentence": "a", "label": 0.5}), SENTIMENT, r"row 1: .*label.* 0\.5"),
    "a field that is not there": (lines({"text": "a", "label": 1}), SENTIMENT,
        r"row 1: no field 'sentence'; the record has 'text', 'label'"),
    "a text that is a list": (lines({"sentence": ["a"], "label": 1}), SENTIMENT,
        r"row 1: field 'sentence' is \['a'\], expected text or a number"),
    "a row that is too long": (lines(GOOD, {"sentence": "so " * 200, "label": 1}), SENTIMENT,
        r"row 2: \d+ tokens, the limit is 127 \(max_model_len=128 .*\); "
        r"shorten the text, raise max_model_len, or set on_long"),
    "a choice without a value": (lines({"question": "q", "choices": ["a", float("nan")], "answer": 0}), CHOICES,
        r"row 1: field 'choices'\[1\] is nan, expected text or a number"),
    "a field of a field": (lines({"question": "q", "context": {"title": "t"}, "answers.text": "a"}), FLAT,
        r"row 1: no field 'context.title', and fields of fields are not read: write what 'context' holds into"),
    "functions": (chat(ASKED, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}), PROMPTS,
        r"row 1: messages\[1\]: function_call is OpenAI's old form, .* write tool_calls"),
    "chats and prompts": (chat(ASKED, NO) + lines({"prompt": "a", "completion": "b"}),
        PROMPTS, r"row 2: chats \(`messages`\) and prompts are mixed; use one kind in a file"),
    "an image": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
            {"role": "assistant", "content": "a cat"}),
        PROMPTS, r"row 1: messages\[0\].content\[0\] is of type 'image_url': training takes text only"),
}  # fmt: skip

Learnt = list[EncodedExample]


@dataclass(frozen=True)
class Taken:
    """Data, the objective that learns it, and what that is.

    Attributes:
        golds: index of the right candidate of each example.
        learnt: the text to learn of the first example.
        served: the request whose tokens the first example has, or None.
    """

    data: bytes
    objective: Objective
    golds: tuple[int, ...] = ()
    learnt: str | None = None
    served: dict[str, Any] | None = field(default=None)


CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TAKEN: dict[str, Taken] = {
    "labels as pandas writes them": Taken(
        lines(*({"sentence": "a", "label": label} for label in (0.0, 1.0, "0.0", "1", 1))), SENTIMENT, (0, 1, 0, 1, 1)
    ),
    "two files of Windows programs": Taken(
        MARK + lines(GOOD, {"sentence": "b", "label": 0}) + MARK + lines(GOOD), SENTIMENT, (1, 0, 1)
    ),
    "choices that are numbers": Taken(
        lines(
            {"question": "Two plus three?", "choices": ["5", "3", "2", "1"], "answer": 0},
            {"question": "Ten minus nine?", "choices": [2, 3, 1, 0], "answer": 2},
        ),
        CHOICES,
        (0, 2),
    ),
    "a column with a dot": Taken(
        lines({"question": "who sang?", "answers.text": " the choir", "context.title": "A night"}),
        FLAT,
        learnt=" the choir</s>",
    ),
    "an end in the text": Taken(lines({"prompt": "say good:", "completion": " good</s>"}), PROMPTS, learnt=" good</s>"),
    "tool calls": Taken(
        chat(ASKED, CALLS, tools=[TOOL]), PROMPTS, learnt='<call>weather {"town": "Bergen"}</call></s>',
        served={"messages": [ASKED, CALLS], "tools": [TOOL]},
    ),
    "parts": Taken(
        chat(ASKED, {"role": "assistant", "content": [{"type": "text", "text": "no"}]}), PROMPTS, learnt="no</s>",
        served={"messages": [ASKED, NO]},
    ),
    "a developer": Taken(
        chat({"role": "developer", "content": "be short"}, ASKED, NO), PROMPTS, learnt="no</s>",
        served={"messages": [{"role": "system", "content": "be short"}, ASKED, NO]},
    ),
}  # fmt: skip


class Road:
    """One way to a job: takes the bytes of a JSONL file and gives the examples of the job, or raises its refusal."""

    def __init__(
        self, llm: Any, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, render: Any
    ) -> None:
        self.llm, self.template, self.root, self.capsys, self.render = llm, template, tmp_path, capsys, render
        use_engine(monkeypatch, llm)

    def file(self, data: bytes) -> Path:
        path = self.root / "train.jsonl"
        path.write_bytes(data)
        return path

    def python(self, data: bytes, objective: Objective) -> Learnt:
        run = self.llm.finetune(
            self.file(data), objective=OBJECTIVES.build(dict(objective)), steps=1, batch_size=1, progress=False,
            chat={"chat_template": self.template},
        )  # fmt: skip
        return JobDir(run.directory).read_train()

    def command_line(self, data: bytes, objective: Objective) -> Learnt:
        given: list[object] = ["--objective", objective["name"]]
        for name, value in objective.items():
            flag = {"options": "option"}.get(name, name)
            if flag == "label_field" or flag == "completion_field":
                flag = flag.replace("_", "-")
            for part in value if isinstance(value, list) else [value]:
                given += [] if name == "name" else [f"--{flag}", part]
        ended = vllm_zo(
            self.capsys, "train", "--model", "m", "--train", self.file(data), *given, "--steps", 1, "--batch-size", 1,
            "--output", self.root / "out", "--chat-template", self.template, "--quiet",
        )  # fmt: skip
        if ended.status:
            raise ZOError(ended.err)
        return JobDir(self.root / "out").read_train()

    def server(self, data: bytes, objective: Objective) -> Learnt:
        state = StateDir(self.root / "state").acquire()
        store = Store(state.database)
        try:
            files = Files(state, store, Quotas(None, store))
            file_id = files.keep(io.BytesIO(data), "train.jsonl", "fine-tune")["id"]
            request = {
                "model": "m", "training_file": file_id, "seed": 0,
                "method": {"type": "zeroth_order", "zeroth_order": {
                    "hyperparameters": {"steps": 1, "batch_size": 1}, "objective": dict(objective)}},
            }  # fmt: skip
            job = JobRecord(
                id="ftjob-1", created_at=0, model="m", organization_id="o", hyperparameters={}, method={},
                training_file=file_id, seed=0, request=request, model_path="m", base="b",
            )  # fmt: skip
            Preparer(self.llm.llm_engine, state, files, ServerSettings(), self.render, 16).prepare(job)
            return JobDir(state.job(job.id)).read_train()
        finally:
            store.close()
            state.release()


ROADS: dict[str, Callable[[Road, bytes, Objective], Learnt]] = {
    "python": Road.python, "command line": Road.command_line, "server": Road.server,
}  # fmt: skip


@pytest.fixture(scope="module")
def served(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> tuple[Served, Path]:
    template = tmp_path_factory.mktemp("template") / "chatml.jinja"
    template.write_text(CHATML)
    return Served(engines.model("opt"), "--chat-template", str(template)), template


@pytest.fixture
def road(
    engines: Engines, served: tuple[Served, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Road:
    return Road(engines.get(), served[1], tmp_path, monkeypatch, capsys, served[0].render)


@pytest.mark.parametrize("way", ROADS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learnt_is_refused_with_row_field_value_and_the_way_out(road: Road, name: str, way: str) -> None:
    data, objective, message = REFUSED[name]
    with pytest.raises((ZOError, APIError), match=message):
        ROADS[way](road, data, objective)


@pytest.mark.parametrize("way", ROADS)
@pytest.mark.parametrize("name", TAKEN)
def test_what_can_be_learnt_is_learnt_as_it_is_meant(
    road: Road, served: tuple[Served, Path], name: str, way: str
) -> None:
    case = TAKEN[name]
    examples = ROADS[way](road, case.data, case.objective)
    if case.golds:
        assert tuple(example.gold for example in examples) == case.golds
    first = examples[0].sequences[0]
    if case.learnt is not None:
        assert served[0].tokenizer.decode(first.label_ids) == case.learnt
    if case.served is not None:
        messages, more = case.served["messages"], {k: v for k, v in case.served.items() if k != "messages"}
        whole = served[0].tokenize(messages, answered=True, **more)
        assert [*first.token_ids, first.label_ids[-1]] == whole


def test_a_chat_is_learnt_behind_the_prompt_that_the_program_feeds_the_model(road: Road) -> None:
    (example,) = road.python(chat(ASKED, NO), PROMPTS)
    (answer,) = road.llm.chat([ASKED], SamplingParams(max_tokens=1), use_tqdm=False, chat_template=CHATML)
    (sequence,) = example.sequences
    assert list(sequence.token_ids[: sequence.positions[0] + 1]) == answer.prompt_token_ids
