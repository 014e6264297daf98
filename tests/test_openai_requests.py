"""Create requests: what is refused and by which name, and what "auto" means. Chats as prompts and completions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.openai_app import BASE, app_client, upload
from tests.served import Served
from vllm_zo import Classification, ConfigError, JobConfig, LanguageModeling, Preference, Reward
from vllm_zo.data import encode_examples
from vllm_zo.entrypoints.llm.chats import ServedChats, supervised, with_prompts
from vllm_zo.entrypoints.server.jobs.request import (
    JobRequest,
    clean_suffix,
    job_options,
    read_request,
    shown_hyperparameters,
    shown_method,
)
from vllm_zo.entrypoints.server.models.names import checkpoint_name, final_name

DEMO_MODEL = Path(__file__).parents[1] / "examples" / "demo" / "model"
SENTIMENT = {"name": "classification", "template": "{sentence} It was", "options": [" terrible", " great"]}
CHECK = {
    "type": "string_check",
    "name": "exact",
    "operation": "eq",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
}
GRADERS = "/v1/fine_tuning/alpha/graders"
PYTHON = {"type": "python", "name": "code", "source": "def grade(sample, item):\n    return 0.25"}
JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with app_client(tmp_path_factory.mktemp("state")) as client:
        yield client


@pytest.fixture(scope="module")
def file_id(client: TestClient) -> str:
    return str(upload(client, b'{"sentence": "good", "label": 1}\n').json()["id"])


def zeroth_order(hyperparameters: dict[str, Any] | None = None, **method: Any) -> dict[str, Any]:
    return {"type": "zeroth_order", "zeroth_order": {"hyperparameters": hyperparameters or {}, **method}}


def dpo(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}


def reinforcement(hyperparameters: dict[str, Any] | None = None, grader: Any = None) -> dict[str, Any]:
    return {
        "type": "reinforcement",
        "reinforcement": {"grader": grader or CHECK, "hyperparameters": hyperparameters or {}},
    }


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt-4o"}, "model='gpt-4o': it is not served here; use 'base'"),
    ({"training_file": "file-none"}, "No such file: 'file-none'"),
    ({"training_file": "../server.db"}, "No such file: '../server.db'"),
    ({"validation_file": "file-none"}, "No such file: 'file-none'"),
    ({"training_file": None}, "training_file=None: Input should be a valid string"),
    ({"colour": "red"}, "colour: unknown field"),
    ({"seed": -1}, "seed=-1: Input should be greater than or equal to 0"),
    ({"suffix": "x" * 65}, "suffix=.*: String should have at most 64 characters"),
    ({"suffix": ".."}, "suffix='..': expected letters, digits"),
    ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata=.*: Dictionary should have at most 16 items"),
    ({"metadata": {"k": "v" * 513}}, "String should have at most 512 characters"),
    ({"method": {"type": "orpo"}}, "method.type='orpo': Input should be"),
    (
        {"method": {"type": "supervised", "zeroth_order": {}}},
        "method.zeroth_order: given, but method.type is 'supervised'",
    ),
    ({"method": zeroth_order(algorithm="lozzo")}, "unknown method.zeroth_order.algorithm 'lozzo': did you mean 'lozo'"),
    (
        {"method": zeroth_order({"learning_rat": 1.0})},
        "unknown hyperparameter 'learning_rat': did you mean 'learning_rate'",
    ),
    ({"method": zeroth_order({"output_dir": "/etc"})}, "unknown hyperparameter 'output_dir'"),
    ({"method": zeroth_order({"objective": "x"})}, "unknown hyperparameter 'objective'"),
    ({"method": zeroth_order({"interval": 5}, algorithm="factorized-mezo")}, "unknown hyperparameter 'interval'"),
    ({"method": zeroth_order({"rank": 0})}, "rank=0: expected an integer from 1"),
    ({"method": zeroth_order({"rank": "two"})}, "rank='two': expected an integer"),
    ({"method": zeroth_order({"rank": 64})}, "rank"),
    ({"method": zeroth_order({"eps": 0})}, "eps=0: expected a number > 0"),
    ({"method": zeroth_order({"eps": {"__class__": "x"}})}, "eps=.*: expected a number"),
    ({"method": zeroth_order({"steps": 0})}, "steps=0: expected an integer from 1"),
    ({"method": zeroth_order({"steps": 10**12})}, "steps=1000000000000: expected an integer from 1 to"),
    ({"method": zeroth_order({"steps": True})}, "steps=True: expected an integer"),
    ({"method": zeroth_order({"batch_size": -4})}, "batch_size=-4: expected an integer >= 1"),
    ({"method": zeroth_order({"learning_rate": -1.0})}, "learning_rate=-1.0: expected a number >= 0"),
    ({"method": zeroth_order({"learning_rate_multiplier": 0})}, "learning_rate_multiplier=0: expected a number > 0"),
    ({"method": zeroth_order({"n_epochs": 1, "steps": 5})}, "n_epochs and steps decide the same"),
    ({"method": zeroth_order({"n_evals": 0})}, "n_evals=0: expected an integer >= 1"),
    ({"method": zeroth_order({"lr_schedule": "cyclic"})}, "unknown lr_schedule 'cyclic'"),
    ({"method": zeroth_order({"update_space": "nowhere"})}, "nowhere"),
    ({"method": zeroth_order({"target_modules": "("})}, "target_modules"),
    ({"method": zeroth_order({"target_layers": "upper"})}, "target_layers='upper': expected layers such as '20:'"),
    ({"method": zeroth_order({"target_layers": "2:"})}, "target_layers='2:': the model has 2 layers, 0 to 1"),
    ({"method": zeroth_order(objective={"template": "{a}"})}, "objective.name=None: expected one of"),
    ({"method": zeroth_order(objective={"name": "clasification"})}, "did you mean 'classification'"),
    ({"method": zeroth_order(objective={"name": "classification"})}, "objective.template is missing"),
    (
        {"method": zeroth_order(objective={**SENTIMENT, "template": "{sentence.__class__} is"})},
        "is not a plain field name",
    ),
    ({"method": zeroth_order(objective={**SENTIMENT, "template": "{sentence[0]} is"})}, "is not a plain field name"),
    ({"method": zeroth_order(objective={**SENTIMENT, "options": 3})}, "options=3"),
    (
        {"method": zeroth_order(objective={**SENTIMENT, "bos_token_id": 999_999})},
        "bos_token_id=999999: the model",
    ),
    (
        {"method": zeroth_order(objective={**SENTIMENT, "template": "{sentence} \ud83d"})},
        "request, field 'method'.zeroth_order.objective.template: half a character",
    ),
    ({"metadata": {"note": "\ud83d"}}, "half a character|unicode"),
    ({"hyperparameters": {"n_epoch": 1}}, "unknown hyperparameter 'n_epoch': did you mean 'n_epochs'"),
    ({"hyperparameters": {"n_epochs": 2}, "method": zeroth_order({"steps": 2})}, "hyperparameters: given twice"),
    ({"method": {"type": "reinforcement"}}, "method.reinforcement is missing"),
    ({"method": reinforcement({"max_token": 5})}, "unknown hyperparameter 'max_token': did you mean 'max_tokens'"),
    ({"method": dpo({"beta": 0})}, "beta=0: expected a number > 0"),
    ({"method": dpo({"betta": 0.1})}, "unknown hyperparameter 'betta': did you mean 'beta'"),
    ({"method": dpo({"samples": 2})}, "unknown hyperparameter 'samples'"),
    ({"method": dpo({}) | {"supervised": {}}}, "method.supervised: given, but method.type is 'dpo'"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 0.1}}}}, "unknown hyperparameter"),
    ({"method": reinforcement({"max_tokens": 0})}, "max_tokens=0: expected an integer >= 1"),
    ({"method": reinforcement({"shaping": "sharp"})}, "unknown shaping 'sharp'"),
    (
        {"method": reinforcement({"compute_multiplier": 2.0})},
        "compute_multiplier: not used here; the nearest is 'samples'",
    ),
    ({"method": reinforcement(grader={**CHECK, "operation": "equals"})}, "operation"),
    ({"method": reinforcement(grader=PYTHON)}, "not allowed here"),
    ({"method": zeroth_order({"max_tokens": 5})}, "unknown hyperparameter 'max_tokens'"),
    ({"method": zeroth_order(grader=PYTHON)}, "not allowed here"),
    ({"method": zeroth_order(grader=CHECK, objective=SENTIMENT)}, "grader: needs objective 'reward'"),
    (
        {"method": zeroth_order(objective={"name": "reward", "template": "{q}", "reward": "os:system"})},
        "not allowed here.*a registered reward: exact_match",
    ),
    (
        {"method": zeroth_order(objective={"name": "reward", "template": "{q}", "reward": "m:re.enum.sys.exit"})},
        "expected 'module:function'",
    ),
    (
        {"method": zeroth_order(objective={"name": "reward", "template": "{q}", "reward": "token_f2"})},
        "unknown reward 'token_f2': did you mean 'token_f1'",
    ),
    ({"integrations": [{"type": "comet"}]}, "integrations.0.type='comet'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_cannot_work_is_a_400_that_names_it(client: TestClient, file_id: str, change: Any, message: str) -> None:
    body = json.dumps({"model": BASE, "training_file": file_id, **change})  # escapes even half a character
    response = client.post(JOBS, content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code in (400, 404) and re.search(message, error["message"]), error
    assert client.get(JOBS).json()["data"] == [], "nothing was started"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": 1e999}', b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_no_request_is_a_400(client: TestClient, body: bytes) -> None:
    response = client.post(JOBS, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


BAD_VALUES = [
    ("\ud83d", "half a character"), (float("nan"), "=nan: JSON has no such number"),
    (float("-inf"), "=-inf: JSON has no such number"), (10**400, "an integer of more than 64 bits"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), BAD_VALUES, ids=["surrogate", "nan", "inf", "long"])
def test_what_no_answer_can_hold_is_refused_at_every_door_and_never_stored(
    client: TestClient, file_id: str, value: Any, message: str
) -> None:
    objective = {"name": "reward", "template": "{sentence}", "reward": "exact_match"}
    methods = [zeroth_order(objective={**objective, field: value}) for field in ("pass_reward", "temperature", "stop")]
    methods.append(zeroth_order({"eps": value}))
    graders = [{**CHECK, field: value} for field in ("reference", "name", "pass_threshold")]
    bodies: list[tuple[str, dict[str, Any]]] = [
        *((JOBS, {"model": BASE, "training_file": file_id, "method": method}) for method in methods),
        *((f"{GRADERS}/validate", {"grader": grader}) for grader in graders),
        *((f"{GRADERS}/run", {"grader": grader, "model_sample": "x"}) for grader in graders),
        (f"{GRADERS}/run", {"grader": CHECK, "model_sample": "x", "item": {"answer": [{"a": value}]}}),
        (f"{GRADERS}/run", {"grader": CHECK, "model_sample": value}),
    ]
    for url, body in bodies:
        response = client.post(url, content=json.dumps(body), headers={"content-type": "application/json"})
        error = response.json()["error"]["message"]
        assert response.status_code == 400 and message in error and "request, field" in error, (body, error)
    assert client.get(JOBS).json()["data"] == []


def test_a_body_without_end_is_refused(client: TestClient) -> None:
    response = client.post(JOBS, content=b" " * (5 << 20), headers={"content-type": "application/json"})
    assert response.status_code == 413


@pytest.mark.parametrize("path", ["", "/cancel", "/pause", "/resume", "/events", "/checkpoints"])
def test_an_unknown_job_is_a_404(client: TestClient, path: str) -> None:
    for job_id in ("ftjob-none", "..", "%2e%2e"):
        method = client.post if path in ("/cancel", "/pause", "/resume") else client.get
        assert method(f"{JOBS}/{job_id}{path}").status_code in (404, 405)


@pytest.mark.parametrize("name", ["ft:none", "..", "../../server.db", "job:ftjob-none", "job:../..", "%2e%2e%2f%2e%2e"])
def test_an_unknown_model_is_a_404(client: TestClient, name: str) -> None:
    urls = [f"/v1/fine_tuning/checkpoints/{name}/{what}" for what in ("content", "permissions")]
    assert {client.get(url).status_code for url in urls} == {404}
    assert client.delete(f"/v1/models/{name}").status_code in (404, 405)


# --- values -----------------------------------------------------------------------------------------------------------


def resolved(rows: int | None, **hyperparameters: Any) -> tuple[JobConfig, dict[str, Any]]:
    method = zeroth_order(hyperparameters)
    request = JobRequest(model=BASE, training_file="f", method=method, seed=3)  # type: ignore[arg-type]
    wanted = read_request(request)
    kept = JobRequest.model_validate(json.loads(json.dumps(request.model_dump())))  # in the job's record
    assert read_request(kept) == wanted
    config = JobConfig.from_options(job_options(wanted, rows, LanguageModeling()))
    return config, shown_hyperparameters(wanted, config, rows)


def test_auto_resolves_to_the_documented_values_and_shows_them() -> None:
    every = ("batch_size", "steps", "n_epochs", "learning_rate", "learning_rate_multiplier", "eval_interval", "rank")
    for given in ({}, {name: "auto" for name in every}):
        config, shown = resolved(160, **given)
        assert (config.batch_size, config.steps, config.learning_rate, config.eval_interval) == (16, 1000, "auto", 250)
        assert {name: shown[name] for name in every} == {
            "batch_size": 16, "steps": 1000, "n_epochs": 100, "learning_rate": "auto",
            "learning_rate_multiplier": 1.0, "eval_interval": 250, "rank": 2,
        }  # fmt: skip
        assert [name for name, value in shown.items() if value == "auto"] == ["learning_rate"], "the run measures it"


def test_long_rows_and_patience_are_the_options_of_python_and_the_command_line() -> None:
    config, shown = resolved(50, on_long="truncate-left", patience="3")
    assert (config.on_long, config.patience) == (shown["on_long"], shown["patience"]) == ("truncate-left", 3)
    with pytest.raises(ConfigError, match="unknown on_long 'cut': .*truncate-left"):
        resolved(50, on_long="cut")
    with pytest.raises(ConfigError, match="patience=0: expected an integer >= 1"):
        resolved(50, patience=0)


def test_epochs_count_whole_passes_over_the_data() -> None:
    assert resolved(100, n_epochs=3, batch_size=16)[0].steps == 21
    assert resolved(5, n_epochs=2)[0].batch_size == 5


def test_what_depends_on_the_data_is_open_until_it_is_read_and_refused_for_nothing_else() -> None:
    _, shown = resolved(None, n_epochs=3, warmup_steps=100)
    assert (shown["n_epochs"], shown["steps"], shown["eval_interval"], shown["batch_size"]) == (3, *["auto"] * 3)
    _, shown = resolved(None)
    assert (shown["n_epochs"], shown["steps"], shown["eval_interval"]) == ("auto", 1000, 250)
    with pytest.raises(ConfigError, match="n_epochs=0"):
        resolved(None, n_epochs=0)


def test_the_multiplier_scales_what_auto_means_and_what_is_given() -> None:
    for given in ({}, {"learning_rate": 0.5}):
        config, shown = resolved(50, learning_rate_multiplier=3.0, **given)
        assert config.learning_rate_multiplier == shown["learning_rate_multiplier"] == 3.0
        assert config.learning_rate == shown["learning_rate"] == given.get("learning_rate", "auto")


def test_counts_of_evaluations_become_intervals() -> None:
    assert resolved(50, steps=100, n_evals=10)[0].eval_interval == 10
    assert resolved(50, steps=3, n_evals=10)[0].eval_interval == 1


def test_a_seed_is_drawn_where_none_is_given() -> None:
    requests = [JobRequest(model=BASE, training_file="f") for _ in range(2)]  # type: ignore[call-arg]
    assert len({read_request(request).seed for request in requests}) == 2


def test_names_are_made_of_safe_parts() -> None:
    assert clean_suffix("My model/../v1 (ü)") == "My-model-v1"
    job: Any = SimpleNamespace(id="ftjob-abc", model="/models/opt-125m", suffix="tone")
    assert final_name(job) == "ft:opt-125m:vllm-zo:tone:abc"
    job.suffix, job.model = None, "facebook/opt"
    assert checkpoint_name(job, 7) == "ft:opt:vllm-zo::abc:ckpt-step-7"


# --- chats ------------------------------------------------------------------------------------------------------------

MESSAGES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
TEMPLATE = MESSAGES + "{% if add_generation_prompt %}<assistant>{% endif %}"
ANSWER = Reward("{prompt}", grader=CHECK)
CHAT = [
    {"role": "user", "content": "a film ?"},
    {"role": "assistant", "content": "good", "weight": 0},
    {"role": "user", "content": "another ?"},
    {"role": "assistant", "content": "bad"},
]


@pytest.fixture(scope="module")
def renderer() -> Any:
    return Served(DEMO_MODEL).renderer


@pytest.fixture(scope="module")
def tokenizer(renderer: Any) -> Any:
    return renderer.get_tokenizer()


def test_only_the_assistants_tokens_are_learnt(renderer: Any, tokenizer: Any) -> None:
    pairs, objective = supervised([{"messages": CHAT}], ServedChats(renderer, TEMPLATE), "training_file")
    before = "<user>a film ?</s><assistant>good</s><user>another ?</s><assistant>"
    assert pairs == [{"prompt": before, "completion": "bad</s>"}], "weight 0 is context only"
    (example,) = encode_examples(pairs, objective, tokenizer, 128, "train")
    (row,) = example.sequences
    whole = tokenizer(before + "bad</s>", add_special_tokens=False)["input_ids"]
    learnt = tokenizer("bad</s>", add_special_tokens=False)["input_ids"]
    assert list(row.token_ids) == whole[:-1], "no second BOS, and the last token is scored but not fed"
    assert list(row.label_ids) == learnt == whole[-len(learnt) :]


def test_every_assistant_message_is_an_example(renderer: Any) -> None:
    chat = [{**message, "weight": 1} for message in CHAT]
    pairs, _ = supervised([{"messages": chat}], ServedChats(renderer, TEMPLATE), "training_file")
    assert [pair["completion"] for pair in pairs] == ["good</s>", "bad</s>"]


def test_prompts_and_completions_are_taken_as_they_are(renderer: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    assert supervised(rows, ServedChats(renderer, None), "training_file") == (rows, LanguageModeling())


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"messages": CHAT}, {"prompt": "a"}], "row 2: chats .* and prompts are mixed"),
        ([{"messages": "hello"}], "row 1: messages must be a list"),
        ([{"messages": []}], "row 1: no assistant message"),
        ([{"messages": CHAT[:1]}], "row 1: no assistant message"),
        ([{"messages": CHAT[:2]}], "row 1: no assistant message"),
        ([{"messages": CHAT[3:]}], "row 1: the first message is the assistant's"),
    ],
)
def test_a_chat_that_cannot_be_learnt_names_its_row(renderer: Any, records: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"training_file, {message}"):
        supervised(records, ServedChats(renderer, TEMPLATE), "training_file")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception('no such role') }}",
        "{% for m in messages %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_reaches_into_objects_is_stopped(renderer: Any, template: str) -> None:
    with pytest.raises(ConfigError, match="the chat template does not take this conversation"):
        supervised([{"messages": CHAT}], ServedChats(renderer, template), "training_file")


def test_a_model_without_a_chat_template_says_so(renderer: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"row 1: the chat template does not take .*: As of .* you must provide a chat template"
    ):
        supervised([{"messages": CHAT}], ServedChats(renderer, None), "training_file")


def test_a_template_that_rewrites_the_conversation_is_refused(renderer: Any) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="writes the conversation differently"):
        supervised([{"messages": CHAT}], ServedChats(renderer, template), "training_file")


def test_classification_data_is_left_to_its_objective() -> None:
    wanted = read_request(
        JobRequest(model=BASE, training_file="f", method=zeroth_order(objective=SENTIMENT))  # type: ignore[arg-type]
    )
    assert wanted.objective == Classification("{sentence} It was", [" terrible", " great"])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"messages": CHAT[:1], "prompt": "a"}], "row 1: both messages and prompt"),
        ([{"messages": CHAT}], "row 1: the last message must be one to answer"),
        ([{"messages": []}], "row 1: the last message must be one to answer"),
        ([{"messages": "hello"}], "row 1: messages must be a list"),
        ([{"prompt": "a"}, {"messages": CHAT[:1]}], "row 2: chats .* and prompts are mixed"),
        ([{"prompt": CHAT}], "row 1: the last message must be one to answer"),
        ([{"prompt": []}], "row 1: prompt must be a list of messages"),
        ([{"prompt": ["hello"]}], "row 1: prompt must be a list of messages"),
        ([{"prompt": [{"content": "hello"}]}], r"row 1: prompt\[0\] has no role"),
        ([{"prompt": CHAT[:1], "messages": CHAT[:1]}], "row 1: both messages and prompt"),
        ([{"prompt": CHAT[:1]}, {"prompt": "a"}], "row 2: chats .* and prompts are mixed"),
    ],
)
def test_a_chat_that_cannot_be_answered_names_its_row(renderer: Any, records: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"training_file, {message}"):
        with_prompts(records, ServedChats(renderer, TEMPLATE), ANSWER, "training_file")


def test_the_prompt_of_a_reward_is_the_conversation_as_the_template_writes_it(renderer: Any, tokenizer: Any) -> None:
    template = TEMPLATE.replace("<assistant>", "{{ '<assistant>\\n ' }}")
    records = [{"messages": CHAT[:1], "answer": "good"}]
    asked, objective = with_prompts(records, ServedChats(renderer, template), ANSWER, "training_file")
    prompt = "<user>a film ?</s><assistant>\n "
    assert asked == [{**records[0], "prompt": prompt}]
    (example,) = encode_examples(asked, objective, tokenizer, 128, "train")
    assert list(example.sequences[0].token_ids) == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert example.columns is not None and example.columns["answer"] == "good", "for the grader"


def test_a_prompt_that_is_a_list_of_messages_is_a_chat(renderer: Any) -> None:
    """TRL's conversational form, for rewards and for what is learnt word by word."""
    render = ServedChats(renderer, TEMPLATE)
    of_trl, ours = {"prompt": CHAT[:1], "answer": "good"}, {"messages": CHAT[:1], "answer": "good"}
    assert with_prompts([of_trl], render, ANSWER, "train") == with_prompts([ours], render, ANSWER, "train")
    shown = [{key: value for key, value in message.items() if key != "weight"} for message in CHAT[:3]]
    learnt = supervised([{"prompt": shown, "completion": CHAT[3:]}], render, "train")
    assert learnt == supervised([{"messages": CHAT}], render, "train"), "what the prompt holds is not learnt"
    assert len(learnt[0]) == 1


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (None, "row 1: completion must be a list of messages"),
        ("good", "row 1: completion must be a list of messages"),
        ([{"role": "user", "content": "good"}], "row 1: no assistant message to learn"),
        ([{"role": "assistant", "content": ""}], r"row 1: completion\[0\] has neither content nor tool_calls"),
        ([{"role": "assistant", "content": 3}], r"row 1: completion\[0\].content is 3"),
    ],
)
def test_a_completion_behind_a_chat_is_the_assistants_message(renderer: Any, completion: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"train, {message}"):
        supervised([{"prompt": CHAT[:1], "completion": completion}], ServedChats(renderer, TEMPLATE), "train")


def test_prompts_of_a_reward_are_taken_with_the_tokenizers_own_special_tokens(renderer: Any, tokenizer: Any) -> None:
    records = [{"prompt": "a film", "answer": "good"}]
    asked, objective = with_prompts(records, ServedChats(renderer, TEMPLATE), ANSWER, "training_file")
    assert (asked, objective) == (records, ANSWER)
    (example,) = encode_examples(asked, objective, tokenizer, 128, "train")
    assert list(example.sequences[0].token_ids) == tokenizer("a film")["input_ids"]


def test_a_reinforcement_job_is_a_reward_on_the_answers() -> None:
    method = reinforcement({"max_tokens": 5, "samples": 2, "compute_multiplier": "auto", "steps": 7})
    wanted = read_request(JobRequest(model=BASE, training_file="f", method=method))  # type: ignore[arg-type]
    assert wanted.objective == Reward("{prompt}", grader=CHECK, max_tokens=5, samples=2)
    config = JobConfig.from_options(job_options(wanted, 50, wanted.objective))
    shown = shown_method(wanted, shown_hyperparameters(wanted, config, 50), wanted.objective)
    assert shown["reinforcement"]["grader"] == CHECK
    assert shown["reinforcement"]["hyperparameters"].items() >= {"max_tokens": 5, "samples": 2, "steps": 7}.items()


@pytest.mark.parametrize("given", [{"beta": 0.3, "steps": 7}, {"beta": "auto", "steps": 7}, None])
def test_a_dpo_job_prefers_one_of_two_answers(given: Any) -> None:
    method = {"type": "dpo"} if given is None else dpo(given)
    wanted = read_request(JobRequest(model=BASE, training_file="f", method=method))  # type: ignore[arg-type]
    beta = 0.3 if given and given["beta"] == 0.3 else 0.1
    assert wanted.objective == Preference(beta=beta)
    config = JobConfig.from_options(job_options(wanted, 50, wanted.objective))
    shown = shown_method(wanted, shown_hyperparameters(wanted, config, 50), wanted.objective)
    assert shown["type"] == "dpo" and shown["dpo"]["hyperparameters"].items() >= {"beta": beta}.items()
    assert shown["dpo"]["hyperparameters"]["steps"] == (7 if given else 1000)


def test_a_zeroth_order_job_takes_a_grader_with_and_without_a_reward_objective() -> None:
    for objective, expected in (
        (None, Reward("{prompt}", grader=CHECK)),
        ({"name": "reward", "template": "{q} Answer:"}, Reward("{q} Answer:", grader=CHECK)),
    ):
        method = zeroth_order(grader=CHECK, objective=objective)
        wanted = read_request(JobRequest(model=BASE, training_file="f", method=method))  # type: ignore[arg-type]
        assert wanted.objective == expected


# --- graders ----------------------------------------------------------------------------------------------------------


def test_a_grader_can_be_tried(client: TestClient) -> None:
    assert client.post(f"{GRADERS}/validate", json={"grader": CHECK}).json() == {"grader": CHECK}
    body = {"grader": CHECK, "model_sample": "yes", "item": {"answer": "yes"}}
    answer = client.post(f"{GRADERS}/run", json=body).json()
    assert answer["reward"] == 1.0 and not any(answer["metadata"]["errors"].values())
    assert client.post(f"{GRADERS}/run", json={**body, "model_sample": "no"}).json()["reward"] == 0.0


def test_a_bad_grader_is_a_400_that_names_it(client: TestClient) -> None:
    for path, more in (("validate", {}), ("run", {"model_sample": "x"})):
        response = client.post(f"{GRADERS}/{path}", json={"grader": {**CHECK, "operation": "equals"}, **more})
        assert response.status_code == 400 and "operation" in response.json()["error"]["message"]


def test_python_graders_are_off_unless_the_operator_allows_them(client: TestClient, tmp_path: Path) -> None:
    body = {"grader": PYTHON, "model_sample": "x"}
    for path in ("validate", "run"):
        response = client.post(f"{GRADERS}/{path}", json=body if path == "run" else {"grader": PYTHON})
        assert response.status_code == 400 and "not allowed here" in response.json()["error"]["message"]
    with app_client(tmp_path, allow_python_graders=True) as trusting:
        assert trusting.post(f"{GRADERS}/run", json=body).json()["reward"] == 0.25


def test_a_client_never_names_a_function_to_import_whatever_the_operator_allows(tmp_path: Path) -> None:
    with app_client(tmp_path, allow_python_graders=True) as trusting:
        file_id = upload(trusting, b'{"prompt": "a"}\n').json()["id"]
        for reward in ("os:system", "vllm_zo.objectives.rewards:token_f1", "local:length-0"):
            method = zeroth_order(objective={"name": "reward", "template": "{prompt}", "reward": reward})
            response = trusting.post(JOBS, json={"model": BASE, "training_file": file_id, "method": method})
            assert response.status_code == 400 and "not allowed here" in response.json()["error"]["message"]
