"""What a hostile client sends: none of it holds the event loop or the engine, or ends in a 500.

The first part sends to the routes without an engine, the second to a real server while another client uses it.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engines import reviews
from tests.openai_app import NoEngine, app_client, upload
from tests.openai_server import METHOD, SENTIMENT, Server, Servers, create, jsonl, upload_reviews, wait_for
from vllm_zo.checkpoint.hf_checkpoint import base_fingerprint
from vllm_zo.config import JobConfig
from vllm_zo.entrypoints.server.jobs import runner
from vllm_zo.entrypoints.server.jobs.runner import JobRunner
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.jobs.directory import JobDescription, JobDir
from vllm_zo.jobs.status import JobStatus
from vllm_zo.objectives import Classification

OUTPUT = "{{sample.output_text}}"
JOBS, GRADERS = "/v1/fine_tuning/jobs", "/v1/fine_tuning/alpha/graders"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with app_client(tmp_path_factory.mktemp("hostile") / "state") as client:
        yield client


@pytest.fixture(scope="module")
def training_file(app: TestClient) -> str:
    return str(upload(app, jsonl(reviews(16))).json()["id"])


# --- one request at a time --------------------------------------------------------------------------------------------


def job(training_file: str, objective: Any = SENTIMENT, **hyperparameters: Any) -> dict[str, Any]:
    method = {"hyperparameters": {**METHOD, **hyperparameters}, "objective": objective}
    return {
        "model": "base",
        "training_file": training_file,
        "method": {"type": "zeroth_order", "zeroth_order": method},
    }


def reward(**fields: Any) -> dict[str, Any]:
    return {"name": "reward", "template": "{sentence}", "reward": "exact_match", **fields}


@pytest.mark.parametrize(
    ("hyperparameters", "objective", "bound"),
    [
        ({"queries": 20_000}, SENTIMENT, "more than 4096 sequences"),
        ({"queries": 2**63}, SENTIMENT, "more than 4096 sequences"),
        ({"batch_size": 2**40}, SENTIMENT, "more than 4096 sequences"),
        ({"micro_batches": 2**40}, SENTIMENT, "more than 4096 sequences"),
        ({}, reward(samples=300_000), "more than 4096 sequences"),
        ({}, reward(max_tokens=10**9), "max_tokens=1000000000: expected at most 128"),
        ({}, reward(timeout_s=1e12), "timeout_s=1000000000000.0: expected at most 600"),
        ({}, reward(template="{sentence}" * 10_000), "template: at most 65536 characters"),
        ({}, reward(stop=["a"] * 1000), "stop: at most 16 texts"),
        ({}, {**SENTIMENT, "options": [f" {i}" for i in range(2000)]}, "options: at most 1000"),
        ({"publish_interval": 1, "steps": 100_000}, SENTIMENT, "more than 10000 checkpoints"),
        ({"steps": 10**12}, SENTIMENT, "steps=1000000000000"),
        ({"interval": 1, "rank": 10**6}, SENTIMENT, "rank=1000000"),
        ({"target_modules": "(.*.*)*x" * 1000}, SENTIMENT, "target_modules: at most 1000 characters"),
        ({"target_modules": "(?=.*)"}, SENTIMENT, "no look-around"),
        ({"target_modules": "((((a{99}){99}){99}){99}){99}"}, SENTIMENT, "not a regular expression"),
    ],
)
def test_a_number_beyond_what_the_engine_takes_is_refused_with_the_bound(
    app: TestClient, training_file: str, hyperparameters: dict[str, Any], objective: Any, bound: str
) -> None:
    took = []
    for _ in range(3):  # a collection of the garbage of a whole session takes a second, and comes once
        started = time.process_time()  # the app runs in a thread of this process; other programs do not count
        answer = app.post(JOBS, json=job(training_file, objective, **hyperparameters))
        took.append(time.process_time() - started)
        assert answer.status_code == 400 and bound in answer.json()["error"]["message"], answer.text
        if took[-1] < 0.1:
            break
    assert min(took) < 1.0, took
    assert not app.get(JOBS).json()["data"], "no job is made of it"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "' + b"x" * (3 << 20) + b'"}', "file, line 2: longer than 2 MiB"),
        (b"[" * 100_000, "file, line 2: not valid JSON"),
    ],
)
def test_an_upload_with_a_line_that_is_too_much_is_refused_by_its_number(
    app: TestClient, line: bytes, message: str
) -> None:
    answer = upload(app, b'{"prompt": "a"}\n' + line)
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(message)


def test_deep_json_is_a_400_in_a_body_and_no_json_in_an_output(app: TestClient) -> None:
    body = b'{"grader": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001
    assert app.post(f"{GRADERS}/validate", content=body).status_code == 400
    grader = {"type": "string_check", "name": "g", "operation": "eq", "reference": "x"}
    grader["input"] = "{{sample.output_json.a}}"
    answer = app.post(f"{GRADERS}/run", json={"grader": grader, "model_sample": "[" * 100_000})
    assert answer.status_code == 200 and answer.json()["metadata"]["errors"]["sample_parse_error"]


# --- specifications by hypothesis -------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.sampled_from([OUTPUT, "{{item.a}}", "{{sample.output_json.a.b}}", "{{", "}}", "", "é"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def mostly(*good: Any) -> st.SearchStrategy[Any]:
    return st.one_of(st.sampled_from(good), st.sampled_from(good), VALUES)


SIMPLE_GRADERS = st.fixed_dictionaries(
    {
        "type": mostly("string_check", "text_similarity", "regex", "python", "score_model"),
        "name": mostly("g"),
        "input": mostly(OUTPUT, "{{item.a}}"),
    },
    optional={
        "reference": mostly("x", OUTPUT),
        "operation": mostly("eq", "ne", "like", "ilike"),
        "evaluation_metric": mostly("fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_l", "cosine"),
        "pattern": mostly("a+", "(a", "(?i)b"),
        "source": mostly("def grade(sample, item): return 1"),
    },
)


def of_one_type(spec: dict[str, Any]) -> dict[str, Any]:
    """Most often only the fields that the type has, so that a good part of the specifications are good."""
    fields = {
        "string_check": ("input", "reference", "operation"),
        "text_similarity": ("input", "reference", "evaluation_metric"),
        "regex": ("input", "pattern"),
    }
    wanted = fields.get(spec["type"]) if isinstance(spec["type"], str) else None
    return spec if wanted is None else {k: v for k, v in spec.items() if k in (*wanted, "type", "name")}


GRADER_SPECS = st.one_of(
    SIMPLE_GRADERS.map(of_one_type),
    st.fixed_dictionaries(
        {
            "type": st.just("multi"),
            "name": mostly("m"),
            "graders": st.one_of(
                st.dictionaries(st.sampled_from(["a", "b", "c d"]), SIMPLE_GRADERS.map(of_one_type), max_size=2), VALUES
            ),
            "calculate_output": mostly("a + b", "a / 0", "min(a, b)", "-" * 900 + "a", "a ^ 999"),
        }
    ),
    st.dictionaries(TEXTS, VALUES, max_size=4),
)
FAST = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


MANY = settings(FAST, max_examples=3000)
given_a_grader = given(
    spec=GRADER_SPECS, sample=TEXTS, item=st.dictionaries(st.sampled_from(["a", "b"]), VALUES, max_size=2)
)


@FAST
@given_a_grader
def test_no_grader_specification_is_a_500(app: TestClient, spec: Any, sample: str, item: Any) -> None:
    try_grader(app, spec, sample, item)


@pytest.mark.slow
@MANY
@given_a_grader
def test_none_of_many_grader_specifications_is_a_500(app: TestClient, spec: Any, sample: str, item: Any) -> None:
    try_grader(app, spec, sample, item)


def try_grader(app: TestClient, spec: Any, sample: str, item: Any) -> None:
    valid = app.post(f"{GRADERS}/validate", json={"grader": spec})
    answer = app.post(f"{GRADERS}/run", json={"grader": spec, "model_sample": sample, "item": item})
    assert valid.status_code == answer.status_code in (200, 400), (spec, valid.text, answer.text)
    for one in (valid, answer):
        assert one.status_code == 200 or one.json()["error"]["message"]


HYPERPARAMETERS = st.dictionaries(
    st.sampled_from(
        ["rank", "interval", "eps", "queries", "steps", "batch_size", "learning_rate", "n_epochs", "target_modules",
         "bases", "publish_interval", "eval_interval", "update_space", "lr_schedule", "warmup_steps", "max_coefficient",
         "estimator", "optimizer", "micro_batches", "divergence_factor", "no_such_option"]
    ),
    st.one_of(VALUES, st.sampled_from(["auto", 0, -1, 1, 2**70, 1e308, "(((", "cosine", "fold", [], {}])),
    max_size=3,
)  # fmt: skip
OBJECTIVES = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {"name": mostly("classification", "reward", "language_modeling", "multiple_choice")},
        optional={
            "template": mostly("{sentence}", "{", "{a.b}"),
            "options": mostly([" a", " b"], ["a", "a"]),
            "labels": VALUES,
            "reward": mostly("exact_match", "vllm_zo.rewards:re.enum.sys.exit"),
            "grader": GRADER_SPECS,
            "samples": VALUES,
            "stop": VALUES,
            "temperature": VALUES,
        },
    ),
    VALUES,
)


given_a_job = given(
    hyperparameters=HYPERPARAMETERS, objective=OBJECTIVES, extra=st.dictionaries(TEXTS, VALUES, max_size=1)
)


@FAST
@given_a_job
def test_no_job_specification_is_a_500(
    app: TestClient, training_file: str, hyperparameters: Any, objective: Any, extra: Any
) -> None:
    try_job(app, training_file, hyperparameters, objective, extra)


@pytest.mark.slow
@MANY
@given_a_job
def test_none_of_many_job_specifications_is_a_500(
    app: TestClient, training_file: str, hyperparameters: Any, objective: Any, extra: Any
) -> None:
    try_job(app, training_file, hyperparameters, objective, extra)


def try_job(app: TestClient, training_file: str, hyperparameters: Any, objective: Any, extra: Any) -> None:
    body = job(training_file, objective)
    body["method"]["zeroth_order"]["hyperparameters"] = hyperparameters
    with_extra = {**body, **extra}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobRunner, "submit", lambda *_: None)  # a good one becomes a job, which needs an engine
        answer = app.post(JOBS, json=with_extra)
    assert answer.status_code in (200, 400), (with_extra, answer.text)
    assert answer.status_code == 200 or answer.json()["error"]["message"]
    assert app.get(JOBS, params={"limit": 5}).status_code == 200, "what was stored is no answer any more"


# --- jobs that end the server -----------------------------------------------------------------------------------------


def test_a_job_that_ran_at_two_ends_of_the_server_and_brought_nothing_is_not_started_a_third_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    async def call(self: Any, method: str, *args: Any) -> Any:
        if method == "zo_start":
            started.append(args[0])
            return {}
        await asyncio.Event().wait()  # an engine that hangs

    monkeypatch.setattr(NoEngine, "call", call)
    monkeypatch.setattr(runner, "FRUITLESS_S", 0)
    record = JobRecord(
        id="ftjob-1", created_at=1, model="base", organization_id="o", hyperparameters={}, method={}, seed=1,
        training_file="file-1", request=job("file-1") | {"seed": 1}, model_path="base",
        base=base_fingerprint("base"), status=JobStatus.QUEUED,
        total_steps=10,
    )  # fmt: skip
    directory, objective = JobDir(tmp_path / "state" / "jobs" / record.id), Classification("{a}", [" b", " c"])
    directory.path.mkdir(parents=True)
    directory.write(JobDescription("base", JobConfig(objective=objective), False, None), [], [])
    for start in range(3):
        with app_client(tmp_path / "state") as client:
            zo: Any = client.app.state.zo  # type: ignore[attr-defined]
            if start == 0:
                zo.store.add_job(record)
            assert client.portal is not None
            client.portal.call(zo.runner.resume_all)
            zo.store.move_job("ftjob-1", {JobStatus.QUEUED}, JobStatus.RUNNING)
            shown = client.get(f"{JOBS}/ftjob-1").json()
            while len(started) == start and shown["status"] != "failed":
                shown = client.get(f"{JOBS}/ftjob-1").json()
            client.portal.call(zo.runner.stop)
    assert len(started) == 2
    assert shown["status"] == "failed" and shown["error"]["code"] == "poisoned"
    assert "ended 2 times while this job ran" in shown["error"]["message"]


def test_a_job_needs_trust_again_when_it_starts_again(tmp_path: Path) -> None:
    grader = {"type": "python", "name": "p", "source": "def grade(sample, item):\n    return 1.0"}
    objective = reward(grader=grader)
    del objective["reward"]
    with app_client(tmp_path / "state", allow_python_graders=True) as client:
        file_id = str(upload(client, jsonl(reviews(16))).json()["id"])
        zo: Any = client.app.state.zo  # type: ignore[attr-defined]
        zo.runner.submit = lambda job: None  # the server is killed before it prepares the job
        created = client.post(JOBS, json=job(file_id, objective)).json()
        zo.store.move_job(created["id"], {JobStatus.VALIDATING}, JobStatus.QUEUED, total_steps=10)
    with app_client(tmp_path / "state") as client:
        zo = client.app.state.zo  # type: ignore[attr-defined]
        assert client.portal is not None
        client.portal.call(zo.runner.resume_all)
        failed = client.get(f"{JOBS}/{created['id']}").json()
        client.portal.call(zo.runner.stop)
    assert failed["status"] == "failed" and "not allowed here" in failed["error"]["message"], failed


# --- a real server, while another client uses it ----------------------------------------------------------------------

HEALTH_BOUND_S, SLOWER, ATTEMPTS = 0.1, 2.0, 12
"""What an attack may add to the slowest /health, and how often the usual time a completion may take meanwhile. Both are
compared with what the same client saw just before, and tried again where they fail: the cores are shared with other
programs, and what really holds the server up does so every time. Of a /health the time does not count in which the
server's loop or the client could have run and had no core."""


def without_core(thread: int) -> float:
    """Seconds in which a thread could have run and other threads had the cores; 0 where the kernel does not count."""
    counted = Path(f"/proc/{thread}/task/{thread}/schedstat")
    return int(counted.read_text().split()[1]) / 1e9 if counted.exists() else 0.0


class Watch:
    """A client that asks for /health and for completions all the time, each in a thread of its own."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stop = threading.Event()
        self.health: list[float] = []
        self.completions: list[float] = []
        completion = {"model": "tiny", "prompt": "It was", "max_tokens": 8, "ignore_eos": True}
        self._threads = [
            threading.Thread(target=self._ask_for_health),
            threading.Thread(target=self._ask_for_completions, args=(completion,)),
        ]

    def _ask_for_health(self) -> None:
        def now() -> float:
            return time.monotonic() - sum(map(without_core, (self._server.process.pid, threading.get_native_id())))

        with self._server.http() as http:
            while not self._stop.wait(0.02):
                started = now()
                assert http.get("/health").status_code == 200
                self.health.append(now() - started)

    def _ask_for_completions(self, completion: dict[str, Any]) -> None:
        with self._server.http() as http:
            while not self._stop.is_set():
                started = time.monotonic()
                assert http.post("/v1/completions", json=completion).status_code == 200
                self.completions.append(time.monotonic() - started)

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def during(self, act: Callable[[], Any], at_least_s: float = 1.0) -> tuple[float, float]:
        """The slowest /health and the median completion from now until `act` has ended."""
        health, completions, started = len(self.health), len(self.completions), time.monotonic()
        act()
        while (
            time.monotonic() - started < at_least_s
            or len(self.health) == health
            or len(self.completions) < completions + 5
        ):
            assert all(thread.is_alive() for thread in self._threads)
            time.sleep(0.02)
        return max(self.health[health:]), median(self.completions[completions:])


def grader_run(spec: dict[str, Any], sample: str, item: dict[str, Any] | None = None) -> tuple[str, Any]:
    grader = {"name": "g", "input": OUTPUT, **spec}
    return f"{GRADERS}/run", {"grader": grader, "model_sample": sample, "item": item or {}}


def python_grader(body: str) -> dict[str, Any]:
    return {"type": "python", "name": "p", "source": f"import os\ndef grade(sample, item):\n    {body}"}


HARMLESS_RUN = {"grader": python_grader("return 1.0"), "model_sample": "x"}
LONG = " ".join(["word", "other"] * 40_000)
PYTHON_RUNS = [
    {"grader": python_grader(body), "model_sample": "x"}
    for body in ("return len('x' * (1 << 40))", "return os.fork()", "os.write(3, b'{')\n    os._exit(0)")
]
POSTS: list[tuple[str, Any, int]] = [
    (f"{GRADERS}/validate", {"grader": {"type": "string_check", "name": "g", "operation": "eq", "reference": "x",
                                        "input": "{" * (32 << 10)}}, 400),
    (*grader_run({"type": "text_similarity", "evaluation_metric": "fuzzy_match", "reference": "{{item.a}}"},
                 LONG[:200_000], {"a": LONG[1:200_000]}), 200),
    (*grader_run({"type": "text_similarity", "evaluation_metric": "rouge_l", "reference": "{{item.a}}"},
                 LONG[:16_000], {"a": LONG[1:16_000]}), 200),
    (*grader_run({"type": "regex", "pattern": "(a|aa)+$"}, "a" * 100_000 + "b"), 200),
    (*grader_run({"type": "string_check", "operation": "eq", "reference": "x", "input": "{{sample.output_json.a}}"},
                 "[" * 200_000), 200),
]  # fmt: skip


@pytest.fixture
def server(servers: Servers) -> Server:
    return servers.running()


def test_no_request_holds_up_another_client(server: Server) -> None:
    client, http, told = server.client(), server.http(), len(server.log.read_text())
    training_file = upload_reviews(client)
    long_line = b'{"prompt": "' + b"x" * (4 << 20) + b'"}\n'  # more of it takes the cores to send, not to read
    jobs = [
        json.dumps({**job(training_file, **hyper), "model": "tiny"})
        for hyper in ({"target_modules": "(.*.*)*x"}, {"queries": 20_000}, {"micro_batches": 300_000})
    ]

    def post(path: str, body: str, status: int) -> None:
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, (path, answer.text)

    def upload_line() -> None:
        files = {"file": ("train.jsonl", long_line)}
        assert http.post("/v1/files", files=files, data={"purpose": "fine-tune"}).status_code == 400

    deep = '{"grader": ' + '{"a":' * 50_000 + "1" + "}" * 50_001
    posts = [(path, json.dumps(body), status) for path, body, status in POSTS]
    posts += [(JOBS, body, status) for body, status in zip(jobs, (200, 400, 400), strict=True)]
    # A Python grader starts a process. On two cores that alone delays /health, so its attacks are held against a grader
    # that does nothing wrong.
    harmless = partial(post, f"{GRADERS}/run", json.dumps(HARMLESS_RUN), 200)
    python_runs = [partial(post, f"{GRADERS}/run", json.dumps(run), 200) for run in PYTHON_RUNS]
    attacks: list[tuple[Callable[[], None], Callable[[], None]]] = [
        *((lambda: None, partial(post, *one)) for one in posts),
        (lambda: None, partial(post, f"{GRADERS}/validate", deep, 400)),
        (lambda: None, upload_line),
        *((harmless, attack) for attack in python_runs),
    ]
    with Watch(server) as watch:
        for number, (usual_act, attack) in enumerate(attacks):
            seen = []
            for _ in range(ATTEMPTS):
                usual = watch.during(usual_act)
                under = watch.during(attack)
                seen.append((usual, under))
                if under[0] < usual[0] + HEALTH_BOUND_S and under[1] < SLOWER * usual[1]:
                    break
            else:
                raise AssertionError(f"attack {number}, (usual, under attack) of (/health, completion): {seen}")
    failed = wait_for(client, client.fine_tuning.jobs.list().data[0].id, "failed")
    assert "matches no module" in failed.error.message
    assert "Traceback" not in server.log.read_text()[told:]


def test_a_line_of_60_mib_costs_no_more_memory_than_a_line_may_have(server: Server) -> None:
    before = peak_memory(server)
    files = {"file": ("train.jsonl", b'{"prompt": "' + b"x" * (60 << 20) + b'"}\n')}
    assert server.http().post("/v1/files", files=files, data={"purpose": "fine-tune"}).status_code == 400
    assert peak_memory(server) < before + (64 << 20), "2.2 GB when the whole line was parsed"


def peak_memory(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


def reward_job(client: Any, grader: dict[str, Any], rows: list[dict[str, str]], steps: int = 10_000) -> str:
    training_file = client.files.create(file=("train.jsonl", jsonl(rows)), purpose="fine-tune").id
    objective = reward(template="{prompt}", grader=grader, max_tokens=4)
    del objective["reward"]
    return str(create(client, training_file, objective=objective, hyperparameters={"steps": steps}).id)


@pytest.mark.slow
def test_a_slow_reward_of_a_job_does_not_slow_the_engine(server: Server) -> None:
    client = server.client()
    rows = [{"prompt": "It was", "answer": LONG[:16_300]} for _ in range(16)]
    quick = {"type": "string_check", "name": "g", "operation": "eq", "input": OUTPUT, "reference": "{{item.answer}}"}
    slow = {"type": "text_similarity", "name": "g", "evaluation_metric": "bleu", "reference": "{{item.answer}}"}
    seen = []
    for _ in range(ATTEMPTS):
        completion = {}
        for name, grader in (("quick", quick), ("slow", {**slow, "input": OUTPUT + " {{item.answer}}"})):
            job_id = reward_job(client, grader, rows)
            wait_for(client, job_id, "running", step=1)
            with Watch(server) as watch:
                _, completion[name] = watch.during(lambda: None, at_least_s=5.0)
            client.fine_tuning.jobs.cancel(job_id)
        seen.append(completion)
        if completion["slow"] < SLOWER * completion["quick"]:
            return
    raise AssertionError(f"a completion beside a job: {seen}")
