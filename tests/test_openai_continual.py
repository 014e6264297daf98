"""Continual jobs on the real server: appended rows, versions with a gate, feedback."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.engines import Engines, reviews
from tests.openai_app import app_client
from tests.openai_server import KEY, METHOD, SENTIMENT, Server, Servers, jsonl, upload_reviews, wait_for
from tests.openai_server import create as create_plain
from vllm_zo import Classification, LanguageModeling, Reward
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.entrypoints.server.http import live_gate
from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.jobs.request import LiveRule
from vllm_zo.entrypoints.server.live.answers import read_answer
from vllm_zo.entrypoints.server.live.lesson import lesson_of
from vllm_zo.entrypoints.server.live.state import LiveState, refusal
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.appended import read_calls

# --- decisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, candidate, live, words",
    [
        ({}, {"eval_loss": 0.5}, {"eval_loss": 0.5}, None),
        ({}, {"eval_loss": 0.51}, {"eval_loss": 0.5}, "its loss is 0.51, that of the live one 0.5"),
        ({"tolerance": 0.02}, {"eval_loss": 0.51}, {"eval_loss": 0.5}, None),
        ({"metric": "accuracy"}, {"eval_accuracy": 0.8}, {"eval_accuracy": 0.9}, "its accuracy is 0.8"),
        ({"metric": "accuracy"}, {"eval_accuracy": 0.95}, {"eval_accuracy": 0.9}, None),
        ({"metric": "f1"}, {"eval_loss": 0.5}, {"eval_loss": 0.5}, "no metric 'f1'"),
        ({}, {"eval_loss": float("nan")}, {"eval_loss": 0.5}, "is no number"),
        ({}, {"eval_loss": 0.5}, None, None),
        ({}, None, None, "not evaluated"),
    ],
)
def test_the_gate(rule: dict[str, Any], candidate: Any, live: Any, words: str | None) -> None:
    why = refusal(LiveRule(**rule), candidate, live, compares=True)
    assert (why is None) == (words is None) and (words is None or words in str(why))
    assert refusal(LiveRule(**rule), candidate, live, compares=False) is None


def test_rollback_goes_one_back_and_holds_until_a_promotion() -> None:
    live = LiveState().goes_live(100).goes_live(200)
    back = live.rolled_back()
    assert (back.step, back.held, back.needed()) == (100, True, {100})
    with pytest.raises(APIError, match="nothing to roll back to"):
        back.rolled_back()
    again = back.promoted(300)
    assert (again.step, again.held, again.history) == (300, False, [100])
    assert LiveState.of(json.loads(json.dumps(again.to_json()))) == again


def test_answers_are_read_from_plain_and_streamed_bodies() -> None:
    asked = {"model": "live:x", "prompt": ["a story"], "max_tokens": 2}
    plain = json.dumps({"id": "cmpl-1", "model": "m", "choices": [{"index": 0, "text": " great"}]}).encode()
    expected = {"id": "cmpl-1", "model": "m", "prompt": "a story", "text": " great"}
    assert read_answer("/v1/completions", asked, plain) == expected
    chunks = [{"id": "cmpl-1", "model": "m", "choices": [{"index": 0, "text": t}]} for t in (" gr", "eat")]
    stream = b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks) + b"data: [DONE]\n\n"
    assert read_answer("/v1/completions", asked, stream) == expected
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    said = json.dumps({"id": "c", "model": "m", "choices": [{"index": 0, "message": {"content": "yes"}}]}).encode()
    assert read_answer("/v1/chat/completions", chat, said)["text"] == "yes"  # type: ignore[index]
    assert read_answer("/v1/completions", {"prompt": ["a", "b"]}, plain) is None
    assert read_answer("/v1/completions", asked, b"no json") is None


@pytest.mark.parametrize(
    "parts",
    [[(b'{"id": "a"}', False)], [(b'data: {"id": "a"}\n\n', True), (b"data: [DONE]\n\n", True), (b"", False)]],
    ids=["whole", "streamed"],
)
def test_an_answer_is_kept_once_and_before_a_client_can_know_its_end(parts: list[tuple[bytes, bool]]) -> None:
    happened: list[Any] = []

    async def send(message: Any) -> None:
        happened.append(message.get("body", "start"))

    async def keep(answer: bytes) -> None:
        happened.append(("kept", answer))

    async def run() -> None:
        answer = live_gate._Answer(send, keep)
        await answer.send({"type": "http.response.start", "status": 200})
        for body, more in parts:
            await answer.send({"type": "http.response.body", "body": body, "more_body": more})

    asyncio.run(run())
    bodies = [body for body, _ in parts]
    end = max(number for number, body in enumerate(bodies) if body)
    assert happened == ["start", *bodies[:end], ("kept", b"".join(bodies)), *bodies[end:]]


def test_what_feedback_teaches() -> None:
    answer = {"id": "c", "model": "m", "prompt": "cold soup It was", "text": " great story"}
    none = {"score": None, "label": None, "text": None}

    def of(objective: Any, **said: Any) -> Any:
        lesson = lesson_of(objective, answer, {**none, **said}, 1.0, lambda *_: "")
        return None if lesson is None else lesson.row

    binary = Classification("{sentence} It was", [" terrible", " great"])
    assert of(binary, label=0) == {"prompt": "cold soup It was", "label": 0}
    assert of(binary, score=1.0) == {"prompt": "cold soup It was", "label": 1}, "the answer that was given"
    assert of(binary, score=0.5) is None
    named = Classification("{sentence} It was", [" terrible", " great"], labels=["bad", "good"])
    assert of(named, score=2)["label"] == "good"
    writing = LanguageModeling()
    assert of(writing, text=" terrible") == {"prompt": "cold soup It was", "completion": " terrible"}
    assert of(writing, score=1.0)["completion"] == " great story"
    with pytest.raises(ConfigError, match="give `text`"):
        of(writing, label=0)
    with pytest.raises(ConfigError, match="another route"):
        of(LanguageModeling(special_tokens=False), text="x")
    with pytest.raises(ConfigError, match="takes none"):
        of(
            Reward(
                "{prompt}",
                grader={"type": "string_check", "name": "g", "operation": "eq", "input": "a", "reference": "a"},
            ),
            score=1.0,
        )


@pytest.mark.parametrize(
    "of_method, words",
    [
        ({"live": {"tolerance": 0.1}}, 'live: needs "continual": true'),
        ({"feedback": {"retention_days": 1}}, 'feedback: needs "continual": true'),
        ({"continual": True, "hyperparameters": {"steps": 10}}, "steps=10: a continual job has no last step"),
        ({"continual": True, "hyperparameters": {"n_evals": 2}}, "set eval_interval"),
        ({"continual": True, "live": {"canary": 0.9}}, "canary"),
        ({"continual": True, "hyperparameters": {"continual": True}}, "continual"),
        ({"continual": True, "hyperparameters": {"update_space": "fold"}}, "update_space='fold'"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(tmp_path: Path, of_method: dict[str, Any], words: str) -> None:
    with app_client(tmp_path) as client:
        data = {"purpose": "fine-tune"}
        file_id = client.post("/v1/files", files={"file": ("a", jsonl(reviews(8)))}, data=data).json()["id"]
        method = {"type": "zeroth_order", "zeroth_order": {"objective": SENTIMENT, **of_method}}
        answer = client.post("/v1/fine_tuning/jobs", json={"model": "base", "training_file": file_id, "method": method})
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_what_is_not_there_is_a_404(tmp_path: Path) -> None:
    with app_client(tmp_path) as client:
        for method, path in (
            ("POST", "jobs/none/examples"), ("GET", "jobs/none/versions"), ("POST", "jobs/none/versions/3/promote"),
            ("POST", "jobs/none/versions/3/rollback"), ("GET", "feedback/fb-x"), ("DELETE", "feedback/fb-x"),
        ):  # fmt: skip
            answer = client.request(method, f"/v1/fine_tuning/{path}", content=b'{"sentence": "a", "label": 1}')
            assert answer.status_code == 404, (method, path, answer.text)
        answer = client.post("/v1/fine_tuning/feedback", json={"completion_id": "cmpl-x", "score": 1})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "completion_not_found"
        for body in ({"score": 1, "label": 1}, {}, {"score": "high"}):
            assert client.post("/v1/fine_tuning/feedback", json={"completion_id": "x", **body}).status_code == 400


# --- the server ------------------------------------------------------------------------------------------------------


def create(client: OpenAI, file_id: str, *, hyperparameters: Any = None, **of_method: Any) -> Any:
    values = {**METHOD, "publish_interval": 20, "eval_interval": 20, "batch_size": 4, **(hyperparameters or {})}
    zeroth = {"continual": True, "hyperparameters": values, "objective": SENTIMENT, **of_method}
    return client.fine_tuning.jobs.create(
        model="tiny", training_file=file_id, seed=3, method={"type": "zeroth_order", "zeroth_order": zeroth}
    )  # type: ignore[call-overload]


def post(server: Server, path: str, **options: Any) -> Any:
    with server.http() as http:
        return http.post(f"/v1/fine_tuning/{path}", **options)


def until(what: Any, timeout_s: float = 120) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def learning(servers: Servers) -> Iterator[tuple[Server, OpenAI, str]]:
    """A continual job that takes feedback, with a canary."""
    server = servers.running()
    client = server.client()
    job = create(
        client, upload_reviews(client, 16), feedback={"retention_days": 30}, live={"canary": 0.5},
        hyperparameters={"keep_versions": 3},
    )  # fmt: skip
    wait_for(client, job.id, "running", step=1)
    yield server, client, job.id
    client.fine_tuning.jobs.cancel(job.id)


def test_rows_are_appended_by_body_and_by_file_all_or_none(learning: tuple[Server, OpenAI, str]) -> None:
    server, client, job_id = learning
    path = f"jobs/{job_id}/examples"
    assert post(server, path, content=jsonl(reviews(3, seed=40))).json() == {
        "object": "fine_tuning.job.examples", "id": job_id, "appended": 3, "total": 3,
    }  # fmt: skip
    file_id = client.files.create(file=("more.jsonl", jsonl(reviews(5, seed=41))), purpose="fine-tune").id
    assert post(server, path, json={"file": file_id}).json()["total"] == 8
    for body, words in (
        (b"", "no records"),
        (b"\n\n", "no records"),
        (jsonl(reviews(2)) + b"{bad\n", "examples, line 3"),
        (jsonl([*reviews(2), {"sentence": "x", "label": 9}]), "examples, row 3"),
        (b'{"sentence": "half a \\ud83d", "label": 1}\n', "examples, line 1"),
        (json.dumps({"file": "file-none"}).encode(), "No such file"),
    ):
        answer = post(server, path, content=body)
        assert answer.status_code in (400, 404) and words in answer.json()["error"]["message"], answer.text
    again = [post(server, path, content=jsonl(reviews(2, seed=42)), headers={"Idempotency-Key": "k"}) for _ in "ab"]
    assert [a.json()["appended"] for a in again] == [2, 0] and again[1].json()["total"] == 10
    plain = create_plain(client, upload_reviews(client), hyperparameters={"steps": 2})
    wait_for(client, plain.id, "queued", "running", "succeeded")
    refused = post(server, f"jobs/{plain.id}/examples", content=jsonl(reviews(1)))
    assert refused.status_code in (400, 409), refused.text
    wait_for(client, plain.id, "succeeded")


def greedy(client: OpenAI, model: str, **more: Any) -> Any:
    return client.completions.create(model=model, prompt="a warm story It was", max_tokens=6, temperature=0, **more)


def test_promote_and_rollback_hold_for_the_next_request_and_no_block_of_another_version_is_used(
    learning: tuple[Server, OpenAI, str],
) -> None:
    server, client, job_id = learning

    def versions() -> Any:
        return server.http().get(f"/v1/fine_tuning/jobs/{job_id}/versions").json()

    until(lambda: len(versions()["data"]) >= 3)
    client_pause = client.fine_tuning.jobs
    client_pause.pause(job_id)
    wait_for(client, job_id, "paused")
    time.sleep(1.5)  # the last version of before the pause may still be on its way
    steps = [version["step"] for version in versions()["data"]]
    by_step = {version["step"]: version["model"] for version in versions()["data"]}
    # A prompt of more than one block, so that the prefix cache has something to reuse.
    prompt = "a warm and clever story , beautifully told , but the soup was cold and the waiter never came back . " * 2
    ask: dict[str, Any] = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 1}

    def scores(model: str) -> Any:
        answer = client.completions.create(model=model, **ask)
        return answer.model, answer.choices[0].logprobs.token_logprobs  # type: ignore[union-attr]

    alone = {step: scores(by_step[step])[1] for step in steps}
    assert len({str(of) for of in alone.values()}) == len(steps), "versions answer alike: the test is blind"
    for step in (steps[0], steps[2], steps[1], steps[0]):
        assert post(server, f"jobs/{job_id}/versions/{step}/promote").json()["live"] == step
        assert scores(f"live:{job_id}") == (by_step[step], pytest.approx(alone[step], abs=1e-4))
    assert post(server, f"jobs/{job_id}/versions/{steps[0]}/rollback").json()["live"] == steps[1]
    assert scores(f"live:{job_id}") == (by_step[steps[1]], pytest.approx(alone[steps[1]], abs=1e-4))
    assert post(server, f"jobs/{job_id}/versions/{steps[0]}/rollback").status_code == 409, "not the live one any more"
    assert post(server, f"jobs/{job_id}/versions/7777/promote").status_code == 404
    deleted = server.http().delete(f"/v1/models/{by_step[steps[1]]}")
    assert deleted.status_code == 409 and "is live" in deleted.json()["error"]["message"]
    assert versions()["held"] and versions()["live"] == steps[1]
    assert post(server, f"jobs/{job_id}/versions/{steps[0]}/promote").json()["held"] is False
    client_pause.resume(job_id)
    # From here on versions go live by themselves again: first as a canary, which answers half of the requests.
    until(lambda: versions()["canary"] is not None)
    found: Counter[str] = Counter()
    for _ in range(40):
        found[client.completions.create(model=f"live:{job_id}", prompt="x", max_tokens=1).model] += 1
    assert len(found) >= 2, found
    until(lambda: versions()["live"] != steps[0])
    kept = versions()
    assert len(kept["data"]) <= 3 + 3, "only the newest are kept, and what answers"
    events = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=1000).data]
    assert any("is the canary" in event for event in events)
    metrics = kept["data"][0]["metrics"]
    assert metrics["update_norm"] > 0 and metrics["distance_from_live"] is not None


def test_feedback_becomes_a_row_is_scored_and_can_be_deleted(learning: tuple[Server, OpenAI, str]) -> None:
    server, client, job_id = learning
    until(lambda: server.http().get(f"/v1/fine_tuning/jobs/{job_id}/versions").json()["live"])
    answers = [greedy(client, model) for model in (f"live:{job_id}", f"job:{job_id}")]
    streamed = list(greedy(client, f"live:{job_id}", stream=True))
    directory = Path(server.log).with_suffix("") / "jobs" / job_id / "appended.jsonl"
    before = sum(call.count for call, _ in read_calls(directory))
    given = [
        post(server, "feedback", json={"completion_id": answers[0].id, "label": 1}),
        post(server, "feedback", json={"completion_id": answers[1].id, "score": 0.25}),
        post(server, "feedback", json={"completion_id": streamed[0].id, "text": " terrible"}),
    ]
    assert [g.status_code for g in given] == [200, 200, 200], [g.text for g in given]
    assert [g.json()["learnt"] for g in given] == [True, False, True]
    assert sum(call.count for call, _ in read_calls(directory)) == before + 2
    again = post(server, "feedback", json={"completion_id": answers[0].id, "label": 1})
    assert again.json() == given[0].json(), "a second try learns nothing twice"
    assert post(server, "feedback", json={"completion_id": answers[0].id, "label": 0}).status_code == 409
    base = greedy(client, "tiny")
    assert post(server, "feedback", json={"completion_id": base.id, "score": 1}).status_code == 404, "not this job's"
    versions = server.http().get(f"/v1/fine_tuning/jobs/{job_id}/versions").json()["data"]
    scored = {version["model"]: version["feedback"] for version in versions}
    if answers[1].model in scored:
        assert scored[answers[1].model] == {"count": 1, "mean_score": 0.25}
    feedback_id = given[0].json()["id"]
    assert server.http().delete(f"/v1/fine_tuning/feedback/{feedback_id}").json()["deleted"]
    assert server.http().get(f"/v1/fine_tuning/feedback/{feedback_id}").status_code == 404
    assert post(server, "feedback", json={"completion_id": answers[0].id, "label": 1}).status_code == 404
    deleted = [call for call, _ in read_calls(directory) if call.key == feedback_id]
    assert [(call.count, call.rows) for call in deleted] == [(1, [])]


def test_many_files_and_feedback_for_a_job_that_has_ended(servers: Servers) -> None:
    server = servers.running()
    client = server.client()
    job = create(
        client, upload_reviews(client, 16), feedback={"retention_days": 1}, hyperparameters={"buffer_rows": 64}
    )
    wait_for(client, job.id, "running", step=1)
    with server.http() as http:
        for number in range(60):
            rows = jsonl(reviews(2, seed=1000 + number))
            answer = http.post(f"/v1/fine_tuning/jobs/{job.id}/examples", content=rows)
            assert answer.json()["total"] == 2 * (number + 1), answer.text
    until(lambda: f"job:{job.id}" in [model.id for model in client.models.list()])
    answer = greedy(client, f"job:{job.id}")
    client.fine_tuning.jobs.cancel(job.id)
    refused = post(server, "feedback", json={"completion_id": answer.id, "label": 1})
    assert refused.status_code == 409 and "learns no more" in refused.json()["error"]["message"]
    assert post(server, f"jobs/{job.id}/examples", content=jsonl(reviews(1))).status_code == 409
    log = read_seed_log(server.log.with_suffix("") / "jobs" / job.id / "seeds.log")
    assert [r.appended.count for r in log.records if r.appended] == sorted(
        {r.appended.count for r in log.records if r.appended}
    )


def test_a_job_far_from_the_base_pauses_with_the_reason(servers: Servers) -> None:
    client = servers.running().client()
    job = create(client, upload_reviews(client, 16), hyperparameters={"max_drift": 1e-6})
    wait_for(client, job.id, "paused")
    events = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100).data]
    assert any("above max_drift=1e-06" in event for event in events), events
    client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.slow
def test_kill_9_loses_no_row_and_no_feedback_and_the_live_version_stays(engines: Engines, tmp_path: Path) -> None:
    state = tmp_path / "state"
    server = Server(str(engines.model("opt")), state).wait_until_ready()
    try:
        client = server.client()
        job = create(client, upload_reviews(client, 16), feedback={"retention_days": 1})
        until(lambda: server.http().get(f"/v1/fine_tuning/jobs/{job.id}/versions").json().get("live"))
        answer = greedy(client, f"live:{job.id}")
        post(server, f"jobs/{job.id}/examples", content=jsonl(reviews(3, seed=7)), headers={"Idempotency-Key": "one"})
        said = post(server, "feedback", json={"completion_id": answer.id, "label": 1}).json()
        versions = server.http().get(f"/v1/fine_tuning/jobs/{job.id}/versions").json()
    finally:
        server.kill()
    server = Server(str(engines.model("opt")), state).wait_until_ready()
    try:
        client = server.client()
        again = post(
            server, f"jobs/{job.id}/examples", content=jsonl(reviews(3, seed=7)), headers={"Idempotency-Key": "one"}
        )
        assert again.json()["appended"] == 0 and again.json()["total"] == 4, again.text
        assert server.http().get(f"/v1/fine_tuning/feedback/{said['id']}").json() == said
        found = server.http().get(f"/v1/fine_tuning/jobs/{job.id}/versions").json()
        assert found["live"] >= versions["live"] and greedy(client, f"live:{job.id}").model
        step = (client.fine_tuning.jobs.retrieve(job.id).model_extra or {})["step"]
        wait_for(client, job.id, "running", step=step + 5)
        log = read_seed_log(state / "jobs" / job.id / "seeds.log")
        assert max(r.appended.count for r in log.records if r.appended) == 4
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_example_follows_a_change_of_its_labels(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    server = Server(str(root / "examples" / "demo" / "model"), tmp_path / "state", "--max-model-len", "256")
    server.wait_until_ready()
    try:
        done = subprocess.run(
            [sys.executable, "examples/continual.py", "--base-url", f"{server.url}/v1", "--api-key", KEY],
            cwd=root, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
    finally:
        server.kill()
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"It followed within \d+ examples", done.stdout), done.stdout
