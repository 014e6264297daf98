"""Rollouts over HTTP: a job on the real server, whose program is another web server that plays with the real SDK."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.openai_server import FLAGS, Server, Servers, create, upload_reviews, wait_for
from tests.test_rollout_remote import Answer, program, score


@pytest.fixture
def client(servers: Servers) -> OpenAI:
    return servers.running().client()


def play(asked: Any) -> float:
    """Two turns with a probe. The address needs no key."""
    probe = OpenAI(base_url=asked["base_url"], api_key="none", max_retries=0)
    text = ""
    for _ in range(2):
        answer = probe.completions.create(model=asked["model"], prompt=asked["row"]["sentence"] + text, max_tokens=4)
        text += answer.choices[0].text
    return len(set(text)) / 10


def rollout_job(
    client: OpenAI, data: str, url: str, steps: int = 4, validation_file: str | None = None, **more: Any
) -> Any:
    objective = {"name": "rollout", "url": url, **more}
    hyperparameters = {"steps": steps, "batch_size": 4, "eps": 0.3}
    return create(
        client, data, objective=objective, validation_file=validation_file, seed=3, hyperparameters=hyperparameters
    )


def test_a_program_plays_against_the_probes_of_a_job(client: OpenAI) -> None:
    data = upload_reviews(client, 8)
    held_out = upload_reviews(client, 3, seed=2)
    sent: list[Any] = []

    def answer(number: int, asked: Any) -> Answer:
        sent.append(asked)
        return score(play(asked))

    with program(answer) as (url, _):
        objective = {"name": "rollout", "url": url, "concurrency": 8}
        job = create(
            client, data, objective=objective, validation_file=held_out, seed=3,
            hyperparameters={"steps": 4, "batch_size": 4, "eps": 0.3, "n_evals": 1},
        )  # fmt: skip
        job = wait_for(client, job.id, "succeeded")
    assert len(sent) == 2 * 3 + 4 * 2 * 4, "each rollout once"
    assert {asked["model"] for asked in sent if "/2/" in asked["model"]} == {f"probe:{job.id}/2/{k}" for k in (0, 1)}
    seeds = {(asked["model"].split("/")[1], asked["row"]["sentence"]): asked["seed"] for asked in sent}
    assert all(asked["seed"] == seeds[asked["model"].split("/")[1], asked["row"]["sentence"]] for asked in sent)
    assert job.trained_tokens > 0 and job.fine_tuned_model
    kept: Any = client.get(f"/fine_tuning/jobs/{job.id}/transcripts", cast_to=object)
    assert (kept["base"]["step"], kept["newest"]["step"]) == (0, 4)
    rollouts = kept["newest"]["rollouts"]
    assert [len(one["said"]) for one in rollouts] == [4] * 3 and rollouts[0]["said"][2]["text"].startswith(
        rollouts[0]["said"][0]["text"]
    )
    assert client.completions.create(model=job.fine_tuned_model, prompt="a", max_tokens=1).choices
    assert not [model.id for model in client.models.list() if model.id.startswith("probe:")]
    late = OpenAI(base_url=sent[-1]["base_url"], api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="This rollout has ended"):
        late.completions.create(model=sent[-1]["model"], prompt="a", max_tokens=1)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model=sent[-1]["model"], prompt="a", max_tokens=1)


def test_what_a_client_may_not_ask_for_is_refused(client: OpenAI) -> None:
    data = upload_reviews(client, 8)
    for objective, message in (
        ({"url": "http://169.254.169.254/latest"}, "posts rollouts to 127.0.0.1 only"),
        ({"play": "os:system"}, "not allowed here"),
        ({"url": "http://127.0.0.1/", "play": "os:system"}, "exactly one"),
        ({"url": "http://127.0.0.1/", "server": {"chat_template": "x"}}, "leave it out"),
        ({"url": "http://127.0.0.1/", "timeout_s": 1e6}, "timeout_s=1000000.0: expected at most"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            create(client, data, objective={"name": "rollout", **objective})
    with pytest.raises(openai.BadRequestError, match="update_space='fold' with rollouts"):
        create(
            client, data, objective={"name": "rollout", "url": "http://127.0.0.1/"},
            hyperparameters={"update_space": "fold", "bases": None},
        )  # fmt: skip


def test_a_program_that_is_down_fails_the_job_with_the_reason(client: OpenAI) -> None:
    job = rollout_job(client, upload_reviews(client, 8), "http://127.0.0.1:9/", on_failure="fail")
    job = wait_for(client, job.id, "failed")
    assert "cannot be reached" in job.error.message and "http://127.0.0.1:9/" in job.error.message


def test_a_job_is_paused_resumed_and_cancelled_in_the_middle_of_its_rollouts(client: OpenAI) -> None:
    data = upload_reviews(client, 8)

    def answer(number: int, asked: Any) -> Answer:
        time.sleep(0.05)
        return score(play(asked))

    with program(answer) as (url, sent):
        whole = wait_for(client, rollout_job(client, data, url).id, "succeeded")
        played_once = len(sent)
        job = rollout_job(client, data, url)
        wait_for(client, job.id, "running", step=1)
        client.post(f"/fine_tuning/jobs/{job.id}/pause", cast_to=object)
        wait_for(client, job.id, "paused")
        client.post(f"/fine_tuning/jobs/{job.id}/resume", cast_to=object)
        wait_for(client, job.id, "succeeded")
        assert len(sent) == 2 * played_once, "no rollout was played twice"
        files = [
            client.files.content(client.fine_tuning.jobs.retrieve(j).result_files[0]).text for j in (whole.id, job.id)
        ]
        assert files[0] == files[1]
        endless = rollout_job(client, data, url, steps=100_000)
        wait_for(client, endless.id, "running", step=1)
        assert client.fine_tuning.jobs.cancel(endless.id).status == "cancelled"
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices


@pytest.mark.slow  # two servers of its own
def test_kill_minus_9_in_the_middle_of_a_step_takes_it_again_with_the_same_seeds(
    servers: Servers, tmp_path: Path
) -> None:
    model = servers.model
    asked_for: list[Any] = []

    def answer(number: int, asked: Any) -> Answer:
        asked_for.append(asked)
        time.sleep(0.02)
        return score(play(asked))

    with program(answer) as (url, _):
        server = Server(model, tmp_path / "state", *FLAGS).wait_until_ready()
        client = server.client()
        data = upload_reviews(client, 8)
        whole = wait_for(client, rollout_job(client, data, url, steps=24).id, "succeeded", timeout_s=240)
        job = rollout_job(client, data, url, steps=24)
        wait_for(client, job.id, "running", step=8)
        server.kill()
        killed = len(asked_for)
        server = Server(model, tmp_path / "state", *FLAGS).wait_until_ready()
        client = server.client()
        job = wait_for(client, job.id, "succeeded", timeout_s=240)
        files = [
            client.files.content(client.fine_tuning.jobs.retrieve(j).result_files[0]).text for j in (whole.id, job.id)
        ]
        assert files[0] == files[1]
        server.stop()
    again = {(a["model"], a["row"]["sentence"]) for a in asked_for[:killed]} & {
        (a["model"], a["row"]["sentence"]) for a in asked_for[killed:]
    }
    assert again and all(model.startswith(f"probe:{job.id}/") for model, _ in again)
