"""Keys of projects: a project sees and changes what is its own, within its limits, and nothing else."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI

from tests.openai_app import OPERATOR_KEY, app_client, upload
from tests.openai_server import Server, Servers, create, upload_reviews, wait_for
from vllm_zo.entrypoints.cli import app as cli
from vllm_zo.entrypoints.server.keys.current import acting_for
from vllm_zo.entrypoints.server.keys.key_file import KeyFile, read_key_file
from vllm_zo.entrypoints.server.keys.limits import today
from vllm_zo.entrypoints.server.launch import parse
from vllm_zo.entrypoints.server.state import store as store_module
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.entrypoints.server.state.store import Store
from vllm_zo.errors import ConfigError

ROW = b'{"prompt": "a", "completion": "b"}\n'
ENDLESS = {"steps": 200_000, "divergence_factor": None, "learning_rate": 1e-4}


# --- the file and its command -----------------------------------------------------------------------------------------


def keys(*words: Any) -> None:
    cli.main(["keys", *map(str, words)])


def test_a_key_is_made_shown_once_listed_and_taken_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    with pytest.raises(SystemExit):
        keys("add", path, "search", "--jobs", 2, "--tokens-a-day", 1000)
    secret, told = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"sk-zo-[\w-]{43}", secret) and "shown this once" in told
    assert secret not in path.read_text() and path.stat().st_mode & 0o077 & ~tmp_path.stat().st_mode == 0
    with pytest.raises(SystemExit):
        keys("add", path, "search", "--bytes", 5)
    file = read_key_file(path)
    (key, _) = file.keys
    assert file.find(secret) == key and file.find("sk-zo-") is None
    assert (file.projects["search"].jobs, file.projects["search"].bytes) == (2, 5), "limits not given stay"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        keys("ls", path)
    assert re.match(
        r"search: jobs 2, bytes 5, tokens_a_day 1000\n  key-\w{8}  \d{4}-\d\d-\d\d\n", capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        keys("rm", path, key.id)
    assert read_key_file(path).find(secret) is None and "search" in read_key_file(path).projects


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ('{"project": {}}', "did you mean 'projects'"),
        ('{"projects": {"a": {"job": 1}}}', "did you mean 'jobs'"),
        ('{"projects": {"a": {"jobs": 0}}}', "jobs=0"),
        ('{"projects": {"../a": {}}}', "project '../a'"),
        ('{"projects": {}, "keys": [{"id": "k"}]}', "expected objects with id, project, sha256, created_at"),
        ('{"keys": [{"id": "k", "project": "b", "sha256": "", "created_at": 0}]}', "project 'b', which is not among"),
    ],
)
def test_a_file_by_hand_is_checked(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_key_file(tmp_path / "keys.json")


def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    tmp_path: Path, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    flags = [str(engines.model("opt")), "--zo-keys", str(tmp_path / "keys.json")]
    with pytest.raises(ConfigError, match="give --api-key"):
        parse(flags)
    with pytest.raises(ConfigError, match="vllm-zo keys add"):
        parse([*flags, "--api-key", "sk"])
    KeyFile().write(tmp_path / "keys.json")
    assert parse([*flags, "--api-key", "sk"]).additional_config["zo_server"]["keys"] == str(tmp_path / "keys.json")


# --- the store --------------------------------------------------------------------------------------------------------


def job_of(owner: str, job_id: str = "ftjob-1") -> JobRecord:
    return JobRecord(
        id=job_id, created_at=0, model="m", organization_id="o", hyperparameters={}, method={}, training_file="f",
        seed=0, request={}, model_path="m", base="b", owner=owner,
    )  # fmt: skip


def test_a_state_directory_of_before_is_the_operators(tmp_path: Path) -> None:
    path = tmp_path / "server.db"
    with sqlite3.connect(path) as old:  # as version 1 wrote it
        old.executescript("".join(store_module.SCHEMA.format(table=table) for table in store_module.TABLES[1]))
        body = {name: value for name, value in job_of("").to_json().items() if name != "owner"}
        old.execute("INSERT INTO jobs (id, status, body) VALUES ('ftjob-1', 'running', ?)", (json.dumps(body),))
        old.execute("""INSERT INTO files (id, parent, body) VALUES ('file-1', 'fine-tune', '{"id": "file-1"}')""")
        old.execute("""INSERT INTO events (id, parent, body) VALUES ('e', 'ftjob-1', '{"id": "e"}')""")
        old.execute("PRAGMA user_version = 1")
    old.close()
    for _ in range(2):  # the second time there is nothing to do
        store = Store(path)
        assert store.job("ftjob-1").owner == "" and [r["id"] for r in store.all("files")] == ["file-1"]
        with acting_for("search"):
            assert not [
                store.all(table) for tables in store_module.TABLES.values() for table in tables if store.all(table)
            ]
        store.close()


# --- the gate, without an engine --------------------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    KeyFile().write(path)
    return path


@pytest.fixture
def app(tmp_path: Path, key_file: Path) -> Iterator[TestClient]:
    with app_client(tmp_path / "state", keys=str(key_file)) as client:
        yield client


def new_key(path: Path, project: str, **limits: int) -> dict[str, str]:
    """Headers with a new key."""
    file, _, secret = read_key_file(path).with_key(project, limits, 0)
    file.write(path)
    return {"Authorization": f"Bearer {secret}"}


OPERATOR = {"Authorization": f"Bearer {OPERATOR_KEY}"}


def test_a_key_works_from_the_moment_it_is_made_until_it_is_taken_away(app: TestClient, key_file: Path) -> None:
    headers = new_key(key_file, "search")
    assert app.get("/v1/files", headers=headers).status_code == 200
    read_key_file(key_file).without_key(read_key_file(key_file).keys[0].id).write(key_file)
    refused = app.get("/v1/files", headers=headers)
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    key_file.write_text("{")  # half edited
    assert app.get("/v1/files", headers=OPERATOR).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/openapi.json", "/v1/load_lora_adapter", "/v1/filesystem", "/sleep"])
def test_a_key_of_a_project_opens_no_other_routes(app: TestClient, key_file: Path, path: str) -> None:
    headers = new_key(key_file, "search")
    for method in ("GET", "POST", "PUT", "DELETE"):
        refused = app.request(method, path, headers=headers)
        assert (refused.status_code, refused.json()["error"]["message"]) == (404, f"Invalid URL ({method} {path})")
        assert app.request(method, path).status_code == 401, "and no key opens none"


def test_what_holds_nothing_of_a_project_is_open(app: TestClient) -> None:
    assert app.get("/fine-tuning").status_code == 200
    assert app.options("/v1/files").status_code == 405, "no 401: a browser asks without a key"


def test_files_and_jobs_are_the_projects_own(app: TestClient, key_file: Path) -> None:
    a, b = new_key(key_file, "a"), new_key(key_file, "b")
    app.headers.update(a)
    file = upload(app, ROW).json()["id"]
    app.headers.update(b)
    assert app.get("/v1/files").json()["data"] == [] and app.get(f"/v1/files/{file}").status_code == 404
    assert app.get("/v1/files", params={"after": file}).status_code == 400
    assert app.delete(f"/v1/files/{file}").status_code == 404
    unusable = app.post("/v1/fine_tuning/jobs", json={"model": "base", "training_file": file})
    assert unusable.status_code == 404 and unusable.json()["error"]["param"] == "training_file"
    assert [one["id"] for one in app.get("/v1/files", headers=OPERATOR).json()["data"]] == [file]
    assert app.get(f"/v1/files/{file}/content", headers=a).content == ROW


def test_a_project_has_no_fold_job(app: TestClient, key_file: Path) -> None:
    app.headers.update(new_key(key_file, "a"))
    file = upload(app, ROW).json()["id"]
    method = {"type": "zeroth_order", "zeroth_order": {"hyperparameters": {"update_space": "fold", "steps": 2}}}
    answer = app.post("/v1/fine_tuning/jobs", json={"model": "base", "training_file": file, "method": method})
    assert answer.status_code == 403 and "only the operator's key" in answer.json()["error"]["message"]


def test_the_limit_of_bytes(app: TestClient, key_file: Path) -> None:
    app.headers.update(new_key(key_file, "a", bytes=2 * len(ROW)))
    first, second, third = upload(app, ROW), upload(app, ROW), upload(app, ROW)
    assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
    assert third.json()["error"]["code"] == third.json()["error"]["type"] == "insufficient_quota"
    app.delete(f"/v1/files/{first.json()['id']}")
    assert upload(app, ROW).status_code == 200
    kept = list((key_file.parent / "state" / "files").iterdir())
    assert len(kept) == 2, "a file that is refused leaves nothing"


def test_the_limit_of_jobs_and_of_tokens(app: TestClient, key_file: Path) -> None:
    store = app.app.state.zo.store  # type: ignore[attr-defined]
    app.headers.update(new_key(key_file, "a", jobs=1, tokens_a_day=100))
    body = {"model": "base", "training_file": upload(app, ROW).json()["id"]}
    store.add_job(job_of("b", "ftjob-b"))
    store.add_tokens("b", today(), 1000)
    store.add_tokens("a", today() - 1, 1000)
    headers = app.get("/v1/files").headers
    assert (headers["x-ratelimit-limit-tokens"], headers["x-ratelimit-remaining-tokens"]) == ("100", "100")
    assert re.fullmatch(r"(\d+h)?(\d+m)?\d+s", headers["x-ratelimit-reset-tokens"])
    store.add_tokens("a", today(), 60)
    store.add_tokens("a", today(), 50)
    refused = app.post("/v1/fine_tuning/jobs", json=body)
    assert refused.status_code == 429 and refused.headers["x-ratelimit-remaining-tokens"] == "0"
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("tokens", "rate_limit_exceeded") and "their 100 of today" in error[
        "message"
    ]
    store.add_job(job_of("a", "ftjob-a"))
    assert "has 1 fine-tuning jobs" in app.post("/v1/fine_tuning/jobs", json=body).json()["error"]["message"]
    assert app.post("/v1/fine_tuning/jobs/ftjob-a/resume").status_code == 429


def test_the_limit_of_requests_says_how_long_to_wait(app: TestClient, key_file: Path) -> None:
    headers = new_key(key_file, "a", requests_a_minute=3)
    answers = [app.get("/v1/files", headers=headers) for _ in range(9)]  # one minute may end between two of them
    statuses = [answer.status_code for answer in answers]
    assert 200 in statuses and 429 in statuses
    refused = answers[statuses.index(429)]
    assert refused.json()["error"]["code"] == "rate_limit_exceeded" and 1 <= int(refused.headers["retry-after"]) <= 60
    assert (
        refused.headers["x-ratelimit-limit-requests"] == "3"
        and refused.headers["x-ratelimit-remaining-requests"] == "0"
    )
    assert re.fullmatch(r"(1m)?\d+s", refused.headers["x-ratelimit-reset-requests"])
    assert app.get("/v1/files", headers=new_key(key_file, "b")).status_code == 200, "another project's is another's"
    assert not any(name.startswith("x-ratelimit") for name in app.get("/v1/files", headers=OPERATOR).headers)


def test_every_change_and_every_refusal_is_a_line_in_the_log(
    app: TestClient, key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    headers = new_key(key_file, "search")
    key = read_key_file(key_file).keys[0].id
    logger = logging.getLogger("vllm.zo.audit")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "vllm.zo.audit"):
            app.headers.update(headers)
            file = upload(app, ROW).json()["id"]
            app.get(f"/v1/files/{file}")
            app.delete(f"/v1/files/{file}", headers=OPERATOR)
            app.get("/v1/files/a%0Ab", headers={"Authorization": "Bearer wrong"})
    finally:
        logger.removeHandler(caplog.handler)
    # Once each: with vLLM's logging set up, the records come by one way only, else by both.
    lines = list(dict.fromkeys(one.getMessage() for one in caplog.records if one.name == "vllm.zo.audit"))
    client = "client=testclient"
    assert lines == [
        f"project=search key={key} {client} POST '/v1/files' status=200 made={file}",
        f"project=- key=operator {client} DELETE '/v1/files/{file}' status=200 made=-",
        f"project=- key=- {client} GET '/v1/files/a\\nb' status=401 made=-",
    ]


# --- the real server --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(servers: Servers) -> Server:
    return servers.running()


def test_nothing_of_a_project_shows_with_a_foreign_key(servers: Servers, server: Server) -> None:
    """Every route, asked with another project's ids, answers as it does for ids that do not exist."""
    owner, stranger = server.client(servers.key_of("a")), server.http(servers.key_of("b"))
    file = upload_reviews(owner, 8)
    job = create(owner, file, validation_file=file, suffix="secret", hyperparameters={"steps": 8, "n_checkpoints": 2})
    job = wait_for(owner, job.id, "succeeded")
    checkpoint = owner.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    event = owner.fine_tuning.jobs.list_events(job.id).data[0]
    mine = {
        "file_id": file, "job_id": job.id, "name": job.fine_tuned_model, "permission_id": "p",
        "checkpoint": checkpoint.fine_tuned_model_checkpoint, "alias": f"job:{job.id}", "probe": f"probe:{job.id}/0",
        "event": event.id, "step": str(checkpoint.step_number), "result": job.result_files[0], "ckpt": checkpoint.id,
    }  # fmt: skip
    none = {name: re.sub(r"[0-9a-f]{24}", "0" * 24, value) for name, value in mine.items()}
    names = {model.id for model in owner.models.list()}
    assert {mine["name"], mine["checkpoint"], mine["alias"]} <= names and owner.files.retrieve(mine["result"])
    assert owner.completions.create(model=mine["alias"], prompt="a", max_tokens=1).choices

    paths = server.http().get("/openapi.json").json()["paths"]
    walked = 0
    for path, operations in paths.items():
        for method, operation in operations.items():
            for alternative in ("name", "checkpoint", "alias", "probe") if "{name}" in path else ("name",):
                for field in ("file_id", "result") if "{file_id}" in path else ("file_id",):
                    answers = [
                        asked(
                            stranger, method, path, operation, ids | {"name": ids[alternative], "file_id": ids[field]}
                        )
                        for ids in (mine, none)
                    ]
                    assert hidden(answers[0], mine) == hidden(answers[1], none), (method, path)
                    walked += 1
    assert walked > 60

    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/models", "/metrics", "/fine-tuning", "/health", "/version"):
        text = stranger.get(path, params={"limit": 1000} if "jobs" in path else {}).text
        assert not [one for one in mine.values() if len(one) > 9 and one in text], path
    for name in ("name", "checkpoint", "alias", "probe"):
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
            ("/v1/responses", {"input": "a"}),
            ("/tokenize", {"prompt": "a"}),
        ):
            answers = [stranger.post(path, json={"model": ids[name], **body}) for ids in (mine, none)]
            assert answers[0].status_code == 404, (path, answers[0].text)
            assert hidden(answers[0], mine) == hidden(answers[1], none)
    after = [stranger.get("/v1/fine_tuning/jobs", params={"after": ids["job_id"]}) for ids in (mine, none)]
    assert hidden(after[0], mine) == hidden(after[1], none)

    # And nothing has happened to any of it.
    assert owner.fine_tuning.jobs.retrieve(job.id).status == "succeeded" and owner.files.retrieve(file).id == file
    assert {model.id for model in owner.models.list()} == names
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert "vllm_zo:slots" in server.http().get("/metrics").text


def asked(client: httpx.Client, method: str, path: str, operation: Any, ids: dict[str, str]) -> httpx.Response:
    url = re.sub(r"{(\w+)[^}]*}", lambda m: ids.get(m[1], "x"), path)
    body: Any = {"model": ids["name"], "training_file": ids["file_id"], "prompt": "a", "max_tokens": 1}
    if path.endswith("/jobs"):
        body = {"model": "tiny", "training_file": ids["file_id"]}
    options = {"json": body} if method in ("post", "put", "patch") else {}
    return client.request(method, url, **options)  # type: ignore[arg-type]


def hidden(answer: httpx.Response, ids: dict[str, str]) -> tuple[int, str]:
    """Status and text, without the ids that were asked for and what differs between any two answers."""
    text = answer.text
    for value in sorted(ids.values(), key=len, reverse=True):
        text = text.replace(value, "<id>") if len(value) > 1 else text
    return answer.status_code, re.sub(r'"(created|id|execution_time)":\s*("[^<"]*"|[\d.e-]+)', "", text)


def test_a_job_that_has_used_its_projects_day_is_paused(servers: Servers, server: Server) -> None:
    client = server.client(servers.key_of("spenders", tokens_a_day=2000))
    job = wait_for(client, create(client, upload_reviews(client, 8), hyperparameters=ENDLESS).id, "paused")
    said = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert "Pausing: project spenders has used its 2000 training tokens of today" in said
    with pytest.raises(Exception, match="their 2000 of today") as refused:
        client.fine_tuning.jobs.resume(job.id)
    assert refused.value.status_code == 429  # type: ignore[attr-defined]
    assert cancelled(server.client(), job.id), "the operator sees it, and may"


def cancelled(client: OpenAI, job_id: str) -> bool:
    return client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
