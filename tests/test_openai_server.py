"""The real server in a child process, driven by the real OpenAI SDK.

The tests share one server with other files. Its ends are in test_server_ends.py.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.engines import reviews
from tests.openai_server import KEY, METHOD, SENTIMENT, Server, Servers, create, jsonl, upload_reviews, wait_for
from vllm_zo.entrypoints.server.metrics import ADAPTER_SETS, INTERVAL_S, KEPT_SETS
from vllm_zo.jobs.status import UNFINISHED

PROMPT = "a warm and clever story It was"
LONG = 100_000


@pytest.fixture
def server(servers: Servers) -> Server:
    return servers.running()


@pytest.fixture(scope="module")
def state_dir(servers: Servers) -> Path:
    return servers.state_dir


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    client = server.client()
    yield client
    if server.process.poll() is None:  # else a test has ended it, and the next one looks at what it left
        for job in client.fine_tuning.jobs.list(limit=100).data:
            if job.status in UNFINISHED:  # a test has failed: the next ones need its lane
                client.fine_tuning.jobs.cancel(job.id)


@pytest.fixture(scope="module")
def data(servers: Servers) -> str:
    return upload_reviews(servers.running().client(), 24)


def answer(client: OpenAI, model: str) -> tuple[str, list[float]]:
    """Greedy text, and the logarithms of its tokens' probabilities, by which models can be told apart."""
    choice = client.completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=1).choices[0]
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    return choice.text, list(choice.logprobs.token_logprobs)


def differs(one: Any, other: Any) -> bool:
    return max(abs(a - b) for a, b in zip(one[1], other[1], strict=True)) > 1e-3


def losses(client: OpenAI, job: Any) -> list[dict[str, str]]:
    content = client.files.content(job.result_files[0]).text
    return list(csv.DictReader(io.StringIO(content)))


# --- a job from start to end ------------------------------------------------------------------------------------------


def test_a_job_from_upload_to_use(client: OpenAI, data: str, state_dir: Path) -> None:
    validation = upload_reviews(client, 8, seed=2)
    before = answer(client, "tiny")
    job = create(
        client, data, validation_file=validation, suffix="my tone", seed=7, metadata={"team": "a"},
        hyperparameters={"steps": 40, "eval_interval": 10, "learning_rate": 3e-2, "keep_best": False},
    )  # fmt: skip
    assert job.status == "validating_files" and job.fine_tuned_model is None and job.seed == 7
    job = wait_for(client, job.id, "succeeded")
    assert job.error is None and job.finished_at >= job.created_at and job.trained_tokens > 0
    assert job.hyperparameters.batch_size == 16 and job.hyperparameters.n_epochs == 27
    assert job.fine_tuned_model == f"ft:tiny:vllm-zo:my-tone:{job.id.removeprefix('ftjob-')}"

    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [c.step_number for c in checkpoints] == [40, 30, 20, 10]
    assert all(c.metrics.full_valid_loss is not None for c in checkpoints)
    names = {model.id for model in client.models.list()}
    assert {job.fine_tuned_model, *(c.fine_tuned_model_checkpoint for c in checkpoints), f"job:{job.id}"} < names

    tuned = answer(client, job.fine_tuned_model)
    assert differs(tuned, before), "the adapter must change something"
    assert not differs(tuned, answer(client, checkpoints[0].fine_tuned_model_checkpoint)), "the same step"
    assert not differs(tuned, answer(client, f"job:{job.id}")), "the newest checkpoint"
    assert differs(tuned, answer(client, checkpoints[-1].fine_tuned_model_checkpoint))
    assert not differs(answer(client, "tiny"), before), "a job in `bank` space never changes the base"
    chat: Any = [{"role": "user", "content": "a film ?"}]
    assert client.chat.completions.create(model=job.fine_tuned_model, messages=chat, max_tokens=2).choices

    rows = losses(client, job)
    assert [int(row["step"]) for row in rows] == list(range(41))
    assert [row["step"] for row in rows if row["valid_loss"]] == ["0", "10", "20", "30", "40"]
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=7)]
    assert messages[0] == "The job has successfully completed"
    assert messages[1] == f"New fine-tuned model created: {job.fine_tuned_model}"
    assert any(m.startswith("Step 40/40: training loss=") for m in messages)
    assert messages[-1] == f"Created fine-tuning job: {job.id}", "oldest last, and the pages were followed"
    made = [state_dir, *state_dir.rglob("*")]
    assert len(made) > 20 and [path for path in made if path.stat().st_mode & 0o077] == [], "for its owner alone"


def test_the_example_runs_as_it_is(server: Server) -> None:
    script = Path(__file__).parents[1] / "examples" / "openai_finetune.py"
    command = [sys.executable, str(script), "--base-url", f"{server.url}/v1", "--api-key", KEY, "--steps", "8"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search(r"New fine-tuned model created: (ft:\S+)\n(.*\n)*\1 says \d+% great", printed), printed
    assert len(re.findall(r"step \d: validation loss \d\.\d+, accuracy \d\.\d+", printed)) == 4, printed


@pytest.mark.slow
def test_a_downloaded_training_file_of_openai_is_learnt_as_the_page_says(server: Server) -> None:
    root = Path(__file__).parents[1]
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", (root / "docs" / "from-openai.md").read_text(), re.M | re.S)
    there = {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": KEY}
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=root, env=os.environ | there, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"Step 100/100: training loss=\d.*\n(.*\n)*succeeded ft:tiny:vllm-zo:club:\w+ None\n.", done.stdout
    )


def test_events_are_streamed_while_they_happen(client: OpenAI, server: Server, data: str) -> None:
    job = create(client, data, hyperparameters={"steps": 30})
    events: list[dict[str, Any]] = []
    with server.http().stream("GET", f"/v1/fine_tuning/jobs/{job.id}/events?stream=true") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no", "nginx holds events back otherwise"
        status_at_first_step = None
        for line in response.iter_lines():
            if line == "data: [DONE]":
                break
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                if status_at_first_step is None and events[-1]["type"] == "metrics":
                    status_at_first_step = client.fine_tuning.jobs.retrieve(job.id).status
    assert status_at_first_step in ("running", "succeeded"), "never a queued job with steps"
    steps = [event["data"]["step"] for event in events if event["type"] == "metrics"]
    assert steps == list(range(1, 31)), "each once, in order"
    wanted = {"total_steps", "train_loss", "loss_plus", "loss_minus", "projected_gradient", "eps", "learning_rate"}
    last = next(event for event in reversed(events) if event["type"] == "metrics")
    assert wanted | {"steps_per_second", "kv_cache_usage"} <= set(last["data"])
    listed = [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert [event["id"] for event in events] == listed[::-1]
    after = events[-3]["id"]
    again = server.http().get(f"/v1/fine_tuning/jobs/{job.id}/events?stream=true", headers={"Last-Event-ID": after})
    assert [line[4:] for line in again.text.splitlines() if line.startswith("id: ")] == listed[1::-1]


def test_a_running_job_can_be_used_and_its_newest_state_is_served(client: OpenAI, data: str) -> None:
    job = create(client, data, hyperparameters={"steps": LONG, "publish_interval": 10, "divergence_factor": None})
    alias = f"job:{job.id}"
    deadline = time.monotonic() + 60
    used: list[str] = []
    while len(set(used)) < 3:
        assert time.monotonic() < deadline, "no new state was published"
        try:
            used.append(client.completions.create(model=alias, prompt=PROMPT, max_tokens=2).model)
        except openai.NotFoundError:
            time.sleep(0.05)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    steps = [int(name.rpartition("-")[2]) for name in used]
    assert steps == sorted(steps), "it only ever moves forward"
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled" and cancelled.fine_tuned_model is None
    last = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    assert answer(client, last.fine_tuned_model_checkpoint)[1], "what it had learnt stays usable"
    with pytest.raises(openai.ConflictError, match="has ended already"):
        client.fine_tuning.jobs.cancel(job.id)


def test_requests_in_flight_keep_the_state_they_began_with(client: OpenAI, data: str) -> None:
    """The same request under a name that never changes gives the same answer however much is published meanwhile."""
    job = create(client, data, hyperparameters={"steps": LONG // 2, "publish_interval": 5, "divergence_factor": None})
    wait_for(client, job.id, "running", step=6)
    while not (page := client.fine_tuning.jobs.checkpoints.list(job.id).data):
        time.sleep(0.05)
    name = page[-1].fine_tuned_model_checkpoint
    first = answer(client, name)
    texts, versions = set(), set()
    while len(versions) < 3:  # requests slow the job down: it may need a few to get so far
        versions.add(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1).data[0].step_number)
        stream = client.completions.create(model=name, prompt=PROMPT, max_tokens=60, temperature=0, stream=True)
        texts.add("".join(chunk.choices[0].text for chunk in stream))
    client.fine_tuning.jobs.cancel(job.id)
    alone = client.completions.create(model=name, prompt=PROMPT, max_tokens=60, temperature=0)
    assert texts == {alone.choices[0].text} and not differs(answer(client, name), first)


def test_a_reinforcement_job_is_driven_by_its_grader(client: OpenAI) -> None:
    grader: Any = {
        "type": "text_similarity", "name": "near", "evaluation_metric": "fuzzy_match",
        "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
    }  # fmt: skip
    chats = [{"messages": [{"role": "user", "content": row["sentence"]}], "answer": " great"} for row in reviews(24)]
    data, validation = (
        client.files.create(file=("chats.jsonl", jsonl(rows)), purpose="fine-tune").id for rows in (chats, chats[:8])
    )
    hyperparameters: Any = {
        **METHOD, "steps": 12, "eval_interval": 6, "max_tokens": 4, "samples": 2, "reasoning_effort": "auto",
    }  # fmt: skip
    method: Any = {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": hyperparameters}}
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=data, validation_file=validation, method=method, seed=1
    )
    done = wait_for(client, job.id, "succeeded")
    assert done.method is not None and done.method.type == "reinforcement" and done.method.reinforcement is not None
    assert done.method.reinforcement.grader.to_dict() == grader
    assert done.method.reinforcement.hyperparameters.to_dict().items() >= {"max_tokens": 4, "samples": 2}.items()
    rows = losses(client, done)
    rewards = [-float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert len(rewards) == 12 and len(set(rewards)) > 6 and all(0.0 <= reward <= 1.0 for reward in rewards)
    assert answer(client, done.fine_tuned_model)


def test_a_dpo_job_of_openais_rows(client: OpenAI) -> None:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    def pairs(count: int, seed: int) -> str:
        rows = [
            {
                "input": {"messages": [{"role": "user", "content": row["sentence"]}], "tools": []},
                "preferred_output": said("great"),
                "non_preferred_output": said("terrible"),
            }
            for row in reviews(count, seed)
        ]
        return client.files.create(file=("pairs.jsonl", jsonl(rows)), purpose="fine-tune").id

    hyperparameters: Any = {"beta": 0.5, "batch_size": 4, "n_epochs": 2, "learning_rate_multiplier": "auto"}
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=pairs(24, 1), validation_file=pairs(8, 2), seed=1,
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
    )  # fmt: skip
    done = wait_for(client, job.id, "succeeded")
    assert done.method is not None and done.method.dpo is not None and done.method.dpo.hyperparameters is not None
    assert done.method.dpo.hyperparameters.beta == 0.5 and done.method.dpo.hyperparameters.n_epochs == 2
    rows = losses(client, done)
    assert float(rows[0]["valid_loss"]) == pytest.approx(0.6931, abs=1e-3)
    trained = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert len(trained) == 12 and len(set(trained)) > 6
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    margins = [event.data["valid_margin"] for event in events if event.data and "valid_margin" in event.data]  # type: ignore[attr-defined, index, operator]
    assert margins[-1] == pytest.approx(0, abs=1e-3) and margins[0] != margins[-1]
    assert answer(client, done.fine_tuned_model)


def test_a_learning_rate_that_the_job_measures_is_shown_from_then_on(client: OpenAI, data: str) -> None:
    job = create(client, data, hyperparameters={"steps": 14, "learning_rate": "auto"})
    done = wait_for(client, job.id, "succeeded").to_dict()
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    rates = [e.data["learning_rate"] for e in events if e.type == "metrics" and "learning_rate" in e.data]  # type: ignore[index, operator]
    shown = done["method"]["zeroth_order"]["hyperparameters"]["learning_rate"]
    assert shown == done["hyperparameters"]["learning_rate"] == rates[0] > 0.0 == rates[-1]


def test_a_job_ends_when_its_time_is_up_and_upper_layers_alone_are_an_adapter(client: OpenAI, data: str) -> None:
    chosen: Any = {"steps": 10**6, "max_seconds": 1, "target_layers": "last", "learning_rate": 3e-2}
    done = wait_for(client, create(client, data, hyperparameters=chosen).id, "succeeded")
    shown = done.to_dict()["hyperparameters"]
    assert (shown["max_seconds"], shown["target_layers"]) == (1, "last")
    steps = [int(row["step"]) for row in losses(client, done)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 10**6
    assert answer(client, done.fine_tuned_model)


# --- several jobs, pausing --------------------------------------------------------------------------------------------


def test_a_paused_job_takes_the_steps_of_an_unbroken_one(client: OpenAI, data: str) -> None:
    # At METHOD's learning rate rounding grows by a factor of ten in a few steps: two runs would part by themselves.
    options: Any = {"seed": 3, "hyperparameters": {"steps": 300, "publish_interval": 1000, "learning_rate": 1e-3}}
    unbroken = wait_for(client, create(client, data, **options).id, "succeeded")
    job = create(client, data, **options)
    wait_for(client, job.id, "running", step=1)
    assert client.fine_tuning.jobs.pause(job.id).status in ("pausing", "paused")
    paused = wait_for(client, job.id, "paused")
    step = paused.model_extra["step"]
    time.sleep(0.5)
    assert client.fine_tuning.jobs.retrieve(job.id).model_extra["step"] == step < 300
    with pytest.raises(openai.ConflictError, match="only a queued or running job can be paused"):
        client.fine_tuning.jobs.pause(job.id)
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    resumed = wait_for(client, job.id, "succeeded")
    # Bit for bit they are only some time after the last request: those of the tests before still cut forwards short,
    # and sums over other numbers of rows round otherwise. A step that is lost or taken twice changes far more.
    ours, theirs = ([float(row["train_loss"]) for row in losses(client, job)] for job in (resumed, unbroken))
    assert ours == pytest.approx(theirs, abs=5e-3)
    with pytest.raises(openai.ConflictError, match="only a paused job can be resumed"):
        client.fine_tuning.jobs.resume(job.id)


def test_clicks_at_once_are_one_transition_and_every_step_is_told_once(client: OpenAI, data: str) -> None:
    job = create(client, data, hyperparameters={"steps": 300})
    wait_for(client, job.id, "running", step=1)

    def click(verb: str) -> str:
        try:
            return str(getattr(client.fine_tuning.jobs, verb)(job.id).status)
        except openai.ConflictError as error:
            return str(error.code)

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(click, ["pause"] * 4))
        wait_for(client, job.id, "paused")
        resumed = list(clients.map(click, ["resume"] * 8))
    assert sorted(resumed) == ["None"] * 7 + ["queued"]
    wait_for(client, job.id, "succeeded")
    events = client.fine_tuning.jobs.list_events(job.id, limit=1000).data
    assert [e.data["step"] for e in events if e.type == "metrics"] == list(range(300, 0, -1))  # type: ignore[index]
    assert [e.message for e in events].count("The job has successfully completed") == 1

    both = create(client, data, hyperparameters={"steps": LONG, "divergence_factor": None})
    wait_for(client, both.id, "running", step=1)
    client.fine_tuning.jobs.pause(both.id)
    wait_for(client, both.id, "paused")
    with ThreadPoolExecutor(2) as clients:
        clients.map(lambda verb: getattr(client.fine_tuning.jobs, verb)(both.id), ["resume", "cancel"])
    assert client.fine_tuning.jobs.retrieve(both.id).status == "cancelled"


def test_jobs_enter_the_queue_in_the_order_of_their_creation(client: OpenAI, data: str) -> None:
    large = client.files.create(file=("large.jsonl", jsonl(reviews(3_000, seed=3))), purpose="fine-tune").id
    first, second = (create(client, file, hyperparameters={"steps": 2}) for file in (large, data))
    while client.fine_tuning.jobs.retrieve(second.id).status == "validating_files":
        pass
    assert client.fine_tuning.jobs.retrieve(first.id).status != "validating_files", "however long its file takes"
    for job in (first, second):
        wait_for(client, job.id, "succeeded")


def test_two_jobs_run_together_and_the_third_waits(client: OpenAI, server: Server, data: str) -> None:
    endless = {"steps": LONG, "divergence_factor": None}
    jobs = [create(client, data, hyperparameters=endless, metadata={"n": str(n)}) for n in range(3)]
    for job in jobs[:2]:
        wait_for(client, job.id, "running", step=5)
    assert client.fine_tuning.jobs.retrieve(jobs[2].id).status == "queued"
    wanted = [f'vllm_zo:job_step{{job="{job.id}"}}' for job in jobs[:2]]
    wanted += ['vllm_zo:slots{state="in_use"} 4.0', 'vllm_zo:tokens_total{use="training"}']
    # The pace is known once there were steps that serve.
    assert client.completions.create(model="tiny", prompt="a warm story", max_tokens=60).choices[0].text
    wanted += ["vllm_zo:budget_tokens ", "vllm_zo:slowdown ", "vllm_zo:idle_used ", "vllm_zo:stops "]
    deadline = time.monotonic() + 10  # they are asked for once a second
    metrics = ""
    while not all(name in metrics for name in wanted) or "vllm_zo:stops 0.0\n" in metrics:
        assert time.monotonic() < deadline, [line for line in metrics.splitlines() if "vllm_zo" in line]
        # Training stops in the worker's process when a request comes to the engine's: soon one comes during a forward.
        client.completions.create(model="tiny", prompt="a warm story", max_tokens=1)
        time.sleep(0.1)
        metrics = server.http().get("/metrics").text
    assert client.fine_tuning.jobs.pause(jobs[2].id).status == "paused", "a queued job pauses at once"
    client.fine_tuning.jobs.pause(jobs[0].id)
    wait_for(client, jobs[0].id, "paused")
    client.fine_tuning.jobs.resume(jobs[2].id)
    wait_for(client, jobs[2].id, "running", step=5)  # in the slots of the paused one
    assert [j.id for j in client.fine_tuning.jobs.list(metadata={"n": "1"})] == [jobs[1].id]
    assert {client.fine_tuning.jobs.cancel(job.id).status for job in jobs} == {"cancelled"}
    listed = [job.id for job in client.fine_tuning.jobs.list(limit=2)]
    assert listed[:3] == [job.id for job in reversed(jobs)] and len(listed) == len(set(listed)) >= 4


def test_metrics_do_not_grow_with_the_adapters_that_were_asked(server: Server, client: OpenAI, data: str) -> None:
    job = wait_for(client, create(client, data, hyperparameters={"steps": 40, "publish_interval": 2}).id, "succeeded")
    checkpoints = [c.fine_tuned_model_checkpoint for c in client.fine_tuning.jobs.checkpoints.list(job.id, limit=100)]
    assert len(checkpoints) > KEPT_SETS
    for name in checkpoints:
        answer(client, name)
    time.sleep(2 * INTERVAL_S)
    found = [line for line in server.http().get("/metrics").text.splitlines() if line.startswith(f"{ADAPTER_SETS}{{")]
    assert 0 < len(found) <= KEPT_SETS
    assert any(checkpoints[-1] in line for line in found) and not any(checkpoints[0] in line for line in found)


# --- what OpenAI's own scripts do -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [{"role": "user", "content": "a film ?"}, {"role": "assistant", "content": "great"}]}] * 5,
        [{"prompt": "a film ?", "completion": " great"}] * 5,
    ],
    ids=["chat", "completion"],
)
def test_a_supervised_script_runs_unchanged(client: OpenAI, rows: Any) -> None:
    file = client.files.create(file=("data.jsonl", jsonl(rows)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        training_file=file.id,
        model="tiny",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 2}}},
    )
    job = wait_for(client, job.id, "succeeded")
    assert (job.model_extra or {})["total_steps"] == 12 and job.method and job.method.type == "supervised"
    assert job.hyperparameters.learning_rate_multiplier == 1.0 and job.fine_tuned_model
    assert answer(client, job.fine_tuned_model)[0]


def test_a_row_that_cannot_be_used_fails_the_job_and_is_named(client: OpenAI) -> None:
    rows = [{"sentence": "good", "label": 1}, {"sentence": "odd", "label": 7}]
    file = client.files.create(file=("data.jsonl", jsonl(rows)), purpose="fine-tune")
    job = create(client, file.id, hyperparameters={"batch_size": 1})
    while (job := client.fine_tuning.jobs.retrieve(job.id)).status == "validating_files":
        time.sleep(0.05)
    assert job.status == "failed" and job.error and job.error.code == "invalid_training_file"
    assert "row 2" in job.error.message and "7" in job.error.message


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_can_be_downloaded_unloaded_and_deleted(client: OpenAI, server: Server, data: str) -> None:
    job = wait_for(client, create(client, data, hyperparameters={"steps": 4}).id, "succeeded")
    assert job.fine_tuned_model is not None
    archive = server.http().get(f"/v1/fine_tuning/checkpoints/{job.fine_tuned_model}/content")
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        assert {Path(name).name for name in tar.getnames()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert client.fine_tuning.checkpoints.permissions.list(job.fine_tuned_model).data == []
    with pytest.raises(openai.PermissionDeniedError, match="not shared"):
        client.fine_tuning.checkpoints.permissions.create(job.fine_tuned_model, project_ids=["p"])
    with pytest.raises(openai.NotFoundError, match="no permission 'p'"):
        client.fine_tuning.checkpoints.permissions.delete("p", fine_tuned_model_checkpoint=job.fine_tuned_model)

    assert client.models.retrieve(job.fine_tuned_model).owned_by == "vllm-zo"
    assert client.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        answer(client, job.fine_tuned_model)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(job.fine_tuned_model)
    assert server.http().get(f"/v1/fine_tuning/checkpoints/{job.fine_tuned_model}/content").status_code == 200
    names = [c.fine_tuned_model_checkpoint for c in client.fine_tuning.jobs.checkpoints.list(job.id)]
    for name in (*names, job.fine_tuned_model):
        assert server.http().delete(f"/v1/models/{name}?delete_files=true").json()["deleted"]
    deadline = time.monotonic() + 10
    while server.http().get(f"/v1/fine_tuning/checkpoints/{names[-1]}/content").status_code != 404:
        assert time.monotonic() < deadline
    with pytest.raises(openai.APIStatusError):
        client.models.delete("tiny")


FOLD: Any = {"update_space": "fold", "bases": None, "interval": 5}


def test_a_fold_job_has_the_engine_to_itself(client: OpenAI, servers: Servers, server: Server, data: str) -> None:
    endless: Any = {"steps": LONG, "divergence_factor": None}  # until it is cancelled, however slow this client is
    other = create(client, data, hyperparameters=endless)
    wait_for(client, other.id, "running", step=1)
    job = create(client, data, hyperparameters={**FOLD, **endless})
    behind = create(client, data, hyperparameters={"steps": 3})
    for waiting in (job, behind):
        wait_for(client, waiting.id, "queued")
    before = answer(client, "tiny")  # until its turn comes the engine serves
    client.fine_tuning.jobs.cancel(other.id)
    wait_for(client, job.id, "running", step=6)
    assert client.fine_tuning.jobs.retrieve(behind.id).status == "queued"
    for model in ("tiny", "job:any"):
        with pytest.raises(openai.ConflictError, match="is changing the base weights"):
            answer(client, model)
    with pytest.raises(openai.ConflictError, match="A job .* is changing the base weights") as refused:
        answer(server.client(servers.key_of("c")), "tiny")
    assert job.id not in refused.value.message, "another project's job"
    with pytest.raises(openai.ConflictError, match="let it end, or cancel it"):
        client.fine_tuning.jobs.pause(job.id)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert not differs(answer(client, "tiny"), before), "when a client reads that it has ended, the base is as it was"
    assert wait_for(client, behind.id, "succeeded"), "from the base as it was loaded"


def test_a_fold_job_gives_a_whole_model_and_the_base_back(client: OpenAI, server: Server, data: str) -> None:
    before = answer(client, "tiny")
    job = wait_for(client, create(client, data, hyperparameters={**FOLD, "steps": 12}).id, "succeeded")
    assert not differs(answer(client, "tiny"), before), "at once: no 409 after its end"
    archive = server.http().get(f"/v1/fine_tuning/checkpoints/{job.fine_tuned_model}/content").content
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert "model.safetensors" in {Path(name).name for name in tar.getnames()}, "a whole model"


def test_a_fold_job_may_leave_its_weights_in_the_base(client: OpenAI, data: str) -> None:
    before = answer(client, "tiny")
    hyperparameters: Any = {**METHOD, **FOLD, "steps": 30}
    method: Any = {
        "type": "zeroth_order",
        "zeroth_order": {"hyperparameters": hyperparameters, "objective": SENTIMENT, "keep_base": True},
    }
    job = client.fine_tuning.jobs.create(model="tiny", training_file=data, method=method)
    job = wait_for(client, job.id, "succeeded")
    assert job.fine_tuned_model in {model.id for model in client.models.list()}
    kept = answer(client, job.fine_tuned_model)
    assert differs(kept, before) and not differs(kept, answer(client, "tiny")), "it is the base now"
    with pytest.raises(openai.ConflictError, match="is in the base now, and a job starts from the model as it was"):
        create(client, data)
    client.models.delete(job.fine_tuned_model)
    assert not differs(answer(client, "tiny"), before), "until it is unloaded"
    with pytest.raises(openai.NotFoundError):
        answer(client, job.fine_tuned_model)


# --- security ---------------------------------------------------------------------------------------------------------


def test_no_route_of_ours_answers_without_the_key(server: Server, client: OpenAI) -> None:
    schema = server.http().get("/openapi.json").json()
    ours = {"files", "fine-tuning", "models", "graders"}
    checked = 0
    stranger = OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            if ours & set(operation.get("tags", [])):
                url = path.replace("{", "").replace("}", "")
                assert stranger._client.request(method, f"{server.url}{url}").status_code == 401, (method, path)
                checked += 1
    assert checked >= 22
    page = stranger._client.get(f"{server.url}/fine-tuning")
    assert page.status_code == 200 and "ftjob" not in page.text, "the page holds no data"
