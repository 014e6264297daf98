"""The coordinator with engines that are slow, silent, repetitive or dead: the log is the one of the undisturbed run."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.simulated_cluster import FACTS, MODULES, OBJECTIVE, Network, Trouble, make_job, start
from tests.fake_cluster import FakeEngine
from vllm_zo import LoZO
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.cluster import coordinator
from vllm_zo.cluster.coordinator import Coordinator
from vllm_zo.cluster.leases import LATE_AT_LEAST_S
from vllm_zo.cluster.protocol import Commit, Join, Score, Scored, Stop, Stopped
from vllm_zo.commands import ApplyRecord, Publish
from vllm_zo.engine.load_job import load_job
from vllm_zo.methods.plan import ProbePlan

FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
QUIET = Trouble()


def run(engines: int, trouble: Trouble, seed: int = 0, **options: Any) -> tuple[bytes, Network]:
    with tempfile.TemporaryDirectory() as folder:
        network = Network(make_job(Path(folder) / "job", **options), engines, trouble, FakeEngine, seed)
        coordinator = network.run()
        assert coordinator.job.status == "succeeded", coordinator.job.summary()
        for engine in network.engines.values():
            assert all(version == steps for version, steps in engine.published), "published as of its own step"
        log = (Path(folder) / "job" / "seeds.log").read_bytes()
        assert len(read_seed_log(Path(folder) / "job" / "seeds.log").records) == coordinator.job.config.steps
        return log, network


@pytest.fixture(scope="module")
def undisturbed() -> bytes:
    return run(1, QUIET)[0]


def test_the_comparison_sees_another_run(undisturbed: bytes) -> None:
    assert run(1, QUIET, seed=7)[0] == undisturbed, "the seed of the network is no part of the job"
    assert run(1, QUIET, eval_interval=2)[0].splitlines()[1:] == undisturbed.splitlines()[1:]
    assert run(1, QUIET, learning_rate=2e-2)[0].splitlines()[1:] != undisturbed.splitlines()[1:]


@pytest.mark.parametrize("engines", [1, 2, 3, 8])
def test_any_number_of_engines_writes_the_same_log(undisturbed: bytes, engines: int) -> None:
    assert run(engines, QUIET)[0] == undisturbed


@given(st.integers(1, 5), st.integers(0, 10_000), st.sampled_from(["lost", "twice", "unequal", "deaths", "crashes"]))
@FEW
def test_one_kind_of_trouble_changes_nothing(undisturbed: bytes, engines: int, seed: int, kind: str) -> None:
    trouble = {
        "lost": Trouble(lost=0.3),
        "twice": Trouble(twice=0.5, latency_s=(0.001, 0.2)),
        "unequal": Trouble(latency_s=(0.0001, 0.1), work_s=(0.001, 1.0)),
        "deaths": Trouble(death_s=0.1),
        "crashes": Trouble(crash_s=0.05),
    }[kind]
    assert run(engines, trouble, seed)[0] == undisturbed


@given(st.integers(1, 5), st.integers(0, 10_000))
@settings(FEW, max_examples=5)  # a run with all of it takes two seconds
def test_all_kinds_together_change_nothing(undisturbed: bytes, engines: int, seed: int) -> None:
    trouble = Trouble(0.1, 0.2, (0.0001, 0.1), (0.001, 0.3), death_s=1.0, restart_s=0.2, crash_s=1.0)
    assert run(engines, trouble, seed)[0] == undisturbed


def test_trouble_happens() -> None:
    """Else the two tests above would prove nothing."""
    networks = [run(3, Trouble(death_s=0.1, crash_s=0.1), seed)[1] for seed in range(10)]
    assert sum(network.deaths for network in networks) > 20 and sum(network.crashes for network in networks) > 5


def test_a_learning_rate_that_is_measured_is_the_same(undisturbed: bytes) -> None:
    options: dict[str, Any] = {"learning_rate": "auto", "steps": 14}
    expected = run(1, QUIET, **options)[0]
    assert run(3, Trouble(twice=0.5, death_s=0.3, crash_s=0.3), **options)[0] == expected


# --- step by step ----------------------------------------------------------------------------------------------------


class Table:
    """A coordinator and engines at one table: the test says who hears and who answers."""

    def __init__(self, path: Path, engines: int = 2, min_engines: int = 1, **options: Any) -> None:
        self.now = 0.0
        job = load_job(make_job(path / "job", **{"validation": 0, **options}), FACTS, None)
        self.coordinator = Coordinator(job, 0, lambda: self.now, min_engines)
        self.engines = {name: FakeEngine() for name in "abcdefgh"[:engines]}
        for name in self.engines:
            self.coordinator.arrive(name)

    def deliver(self) -> list[tuple[str, Any]]:
        """Send what there is to send; returns the answers, which the coordinator has not heard yet."""
        sent = self.coordinator.messages()
        return [(name, answer) for name, message in sent for answer in self.engines[name].tell(message)]

    def hear(self, answers: list[tuple[str, Any]]) -> None:
        for name, answer in answers:
            self.coordinator.receive(name, answer)

    def steps(self, count: int) -> None:
        while self.coordinator.job.recorded < count:
            self.hear(self.deliver())

    def sent(self, kind: type) -> list[tuple[str, Any]]:
        """The messages of a kind that there are to send. Commits arrive; the others do not."""
        messages = self.coordinator.messages()
        for name, message in messages:
            if isinstance(message, Commit):
                self.engines[name].tell(message)
        return [(name, message) for name, message in messages if isinstance(message, kind)]


def test_work_goes_to_the_engine_that_has_least_and_no_engine_has_more_than_two(tmp_path: Path) -> None:
    table = Table(tmp_path, engines=2, shards=8)
    table.hear(table.deliver())
    scores = table.sent(Score)
    assert [name for name, _ in scores] == ["a", "b", "a", "b"]
    one = scores[0][1]
    table.hear([("a", Scored(0, one.number, table.engines["a"].cells(one)))])
    assert [name for name, _ in table.sent(Score)] == ["a"]


def test_the_log_is_written_before_the_commit_is_sent(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.hear(table.deliver())
    table.hear(table.deliver())
    log = tmp_path / "job" / "seeds.log"
    assert table.coordinator.job.recorded == 1
    commits = table.sent(Commit)
    assert [name for name, _ in commits] == ["a", "b"] and read_seed_log(log).num_steps == 1
    (command,) = commits[0][1].commands
    assert isinstance(command, ApplyRecord) and command.record == read_seed_log(log).records[0]


def test_a_full_disk_holds_commits_and_joins_back_until_there_is_space(tmp_path: Path, monkeypatch: Any) -> None:
    table = Table(tmp_path)
    table.hear(table.deliver())
    recorder = table.coordinator.job.recorder
    monkeypatch.setattr(recorder, "hand_over", lambda: False)
    table.hear(table.deliver())
    table.engines["c"] = FakeEngine()
    table.coordinator.arrive("c")
    assert table.coordinator.job.recorded == 1 and table.coordinator.messages() == []
    monkeypatch.undo()
    kinds = [(name, type(message)) for name, message in table.coordinator.messages()]
    assert kinds[:3] == [("a", Commit), ("b", Commit), ("c", Join)], "the join comes after the commits that it covers"


def test_an_engine_that_joins_half_way_has_the_state_of_the_others(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.steps(3)
    table.engines["c"] = FakeEngine()
    table.coordinator.arrive("c")
    table.steps(5)
    table.deliver()
    assert table.engines["c"].records == table.engines["a"].records and len(table.engines["c"].records) == 5
    assert table.coordinator.stats()["c"]["shards"] > 0


def test_the_work_of_an_engine_that_has_gone_goes_to_another(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.hear(table.deliver())
    sent = table.sent(Score)
    lost, scores_of_b = ([message for name, message in sent if name == who] for who in "ab")
    table.coordinator.leave("a")
    again = [message for name, message in table.sent(Score) if name == "b"]
    assert not again, "b has two in hand already"
    (score, *_) = scores_of_b
    table.hear([("b", Scored(0, score.number, table.engines["b"].cells(score)))])
    assert [message.number for _, message in table.sent(Score)] == [lost[0].number]


def test_a_late_work_is_given_to_an_idle_engine_and_the_first_answer_counts(tmp_path: Path) -> None:
    table = Table(tmp_path, shards=2)
    table.steps(2)  # from now on the coordinator knows how long a work takes
    (_, first), (_, second) = table.sent(Score)
    assert table.coordinator.wakes_at() == LATE_AT_LEAST_S
    table.now += 1.0
    table.hear([("b", Scored(0, second.number, table.engines["b"].cells(second)))])
    assert table.sent(Score) == [("b", first)] and table.sent(Score) == [], "once"
    answer = Scored(0, first.number, table.engines["b"].cells(first))
    table.hear([("b", answer), ("a", answer), ("b", answer)])
    assert table.coordinator.job.recorded == 3


def test_messages_of_another_epoch_are_ignored(tmp_path: Path) -> None:
    table = Table(tmp_path)
    answers = table.deliver()
    table.hear([(name, replace(answer, epoch=-1)) for name, answer in answers])
    assert not any(engine["ready"] for engine in table.coordinator.stats().values())
    table.hear(answers)
    assert all(engine["ready"] for engine in table.coordinator.stats().values())
    table.hear([("z", answers[0][1])])  # nobody of that name
    engine = table.engines["a"]
    _, score = table.sent(Score)[0]
    assert engine.tell(replace(score, epoch=-7)) == []


def test_an_engine_that_is_not_like_the_first_ends_the_job_with_what_differs(tmp_path: Path) -> None:
    def ended(**differs: Any) -> str:
        table = Table(tmp_path / str(len(list(tmp_path.iterdir()))))
        (_, first), (_, second) = table.deliver()
        table.hear([("a", first), ("b", replace(second, **differs))])
        assert table.coordinator.job.status == "failed"
        return str(table.coordinator.job.summary()["error"])

    assert "b differs from the first engine: vllm 9 (the first has fake 1)" in ended(software="vllm 9")
    assert "2 target modules that are not its 1" in ended(modules=MODULES * 2)
    table = Table(tmp_path / "header")
    header = table.deliver()[0][1].header
    assert "dtype='bfloat16' (the first has 'float32')" in ended(header=replace(header, dtype="bfloat16"))
    assert "base_fingerprint='0a' (the first has" in ended(header=replace(header, base_fingerprint="0a"))


def test_the_error_of_an_engine_is_the_error_of_the_job(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.steps(2)
    table.hear([("b", Stopped(0, "RuntimeError: the objective has a bug"))])
    assert table.coordinator.job.status == "failed"
    assert table.coordinator.job.summary()["error"] == "b: RuntimeError: the objective has a bug"
    assert [name for name, _ in table.sent(Stop)] == ["a"]
    assert not table.coordinator.ended
    table.hear([("a", Stopped(0))])
    assert table.coordinator.ended


def test_an_engine_whose_state_differs_joins_again_and_a_second_time_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "DIGEST_INTERVAL", 2)
    table = Table(tmp_path)
    table.steps(1)
    table.engines["b"].digest = lambda: 7  # type: ignore[method-assign]
    while len(table.engines["b"].joins) < 2:
        table.hear(table.deliver())
    assert table.coordinator.job.status == "running" and table.engines["a"].joins == [0]
    while table.coordinator.job.status == "running":
        table.hear(table.deliver())
    told = str(table.coordinator.job.summary()["error"])
    assert "the state of b has digest 0000000000000007, and that of a 00000000" in told and "alike" in told


def test_an_engine_that_joined_again_has_the_state_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: bytes
) -> None:
    monkeypatch.setattr(coordinator, "DIGEST_INTERVAL", 2)
    table = Table(tmp_path, validation=6)
    table.steps(1)
    fake = table.engines["b"]
    right = fake.digest
    fake.digest = lambda: right() if len(fake.joins) > 1 else 7  # type: ignore[method-assign]
    while not table.coordinator.ended:
        table.hear(table.deliver())
    assert fake.joins == [0, 0] and table.coordinator.job.status == "succeeded"
    assert (tmp_path / "job" / "seeds.log").read_bytes() == undisturbed


def test_a_job_waits_while_fewer_than_min_engines_are_ready(tmp_path: Path) -> None:
    table = Table(tmp_path, min_engines=2)
    table.steps(2)
    table.coordinator.leave("b")
    for _ in range(5):
        table.hear(table.deliver())
    assert table.coordinator.job.recorded <= 3, "the step under way may end"
    done = table.coordinator.job.recorded
    assert table.coordinator.status()["waits_for"] == "min_engines=2: 1 are ready"
    assert table.sent(Score) == [] and table.coordinator.job.status == "running"
    table.engines["b"] = FakeEngine()
    table.coordinator.arrive("b")
    table.steps(done + 2)
    assert table.coordinator.status()["waits_for"] is None


def test_a_step_goes_on_without_late_directions_after_its_deadline(tmp_path: Path) -> None:
    table = Table(tmp_path, shards=4, method=LoZO(queries=4, interval=3), deadline=1.0)
    table.hear(table.deliver())
    of_a, of_b = ([m for name, m in table.sent(Score) if name == who] for who in "ab")
    cells = {m.number: table.engines["a"].cells(m) for m in [*of_a, *of_b]}
    table.hear([("a", Scored(0, m.number, cells[m.number])) for m in of_a])
    assert table.coordinator.wakes_at() is not None and table.sent(Commit) == []
    table.now += 1.1
    table.hear(table.deliver())
    assert table.coordinator.job.recorded == 1
    (record,) = read_seed_log(tmp_path / "job" / "seeds.log").records
    kept = [index for index, value in enumerate(record.coefficients) if value]
    assert kept == [0, 2] and record.finite, "the shards of engine b are directions 1 and 3"
    assert table.coordinator.status()["records"][-1]["late"] == 2
    half = ProbePlan(0, tuple(p for m in of_a for p in m.plan.probes), 0)
    losses = OBJECTIVE.loss(
        torch.cat([torch.tensor(cells[m.number]) for m in of_a]),
        list(table.coordinator.job.rows.of(of_a[0].example_ids)),
    )[0]
    expected = LoZO(queries=2).coefficients(half, losses).tolist()
    assert [record.coefficients[index] for index in kept] == pytest.approx(expected), "their mean over two"
    # The late answers count for nothing, and the next step takes everybody.
    table.hear([("b", Scored(0, m.number, cells[m.number])) for m in of_b])
    table.steps(2)
    assert "late" not in table.coordinator.status()["records"][-1]


@pytest.mark.parametrize("shards", [2, 8], ids=["more than half are late", "examples are late"])
def test_a_step_that_may_not_drop_what_is_late_waits_for_it(tmp_path: Path, shards: int) -> None:
    options: dict[str, Any] = {"method": LoZO(queries=2, interval=3), "batch_size": 8}
    table = Table(tmp_path, shards=shards, deadline=1.0, **options)
    table.hear(table.deliver())
    sent = [message for _, message in table.sent(Score)]
    if shards == 8:
        table.hear([("a", Scored(0, sent[0].number, table.engines["a"].cells(sent[0])))])
    table.now += 1.1
    table.sent(Score)
    assert table.coordinator.job.recorded == 0


def test_answers_to_a_later_coordinator_end_the_job(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.hear(table.deliver())
    table.hear([("b", Stopped(1))])
    assert "b answers coordinator 1 of this job, and this one is 0" in str(table.coordinator.job.summary()["error"])


def test_a_cancelled_job_keeps_the_steps_that_are_in_its_log(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.steps(3)
    table.coordinator.stop(cancel=True)
    messages = table.coordinator.messages()
    assert [type(m) for _, m in messages if isinstance(m, Commit | Stop)] == [Commit, Commit, Stop, Stop]
    records = [c.record.step for c in messages[0][1].commands if isinstance(c, ApplyRecord)]
    published = [c.version for c in messages[0][1].commands if isinstance(c, Publish)]
    assert records == [2] and published == [3], "its last step, then the state after it"
    assert read_seed_log(tmp_path / "job" / "seeds.log").num_steps == 3


def test_a_job_that_is_asked_to_stop_evaluates_first(tmp_path: Path) -> None:
    table = Table(tmp_path, validation=6)
    table.steps(2)
    table.coordinator.stop(cancel=False)
    while not table.coordinator.ended:
        table.hear(table.deliver())
    assert table.coordinator.job.status == "succeeded"
    assert [e["step"] for e in table.coordinator.job._measured.evaluations] == [0, 2]


def test_a_log_that_another_coordinator_writes_ends_the_job_before_anything_is_scored(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.hear(table.deliver())
    other = start(table.coordinator.job.directory)
    other.arrive("a")
    (_, join), *_ = other.messages()
    other.receive("a", FakeEngine().tell(join)[0])
    assert other.job.status == "failed" and "is being written by a running job" in str(other.job.summary()["error"])
