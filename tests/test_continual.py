"""Jobs whose rows grow: what was appended and when decides the trajectory, and no crash loses or repeats a row."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.children import Child
from tests.engines import SENTIMENT, Engines, reviews
from tests.trajectories import JOB, cut_copy, steps_of
from vllm_zo import ConfigError, JobError, LanguageModeling, LoZO
from vllm_zo.checkpoint.seed_log.format import RowsSoFar, StepRecord, decode_record, encode_record
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.config import BUFFER_POLICIES, JobConfig
from vllm_zo.data.batches import BatchOrder
from vllm_zo.data.buffer import Buffer
from vllm_zo.engine.training_rows import GrowingRows
from vllm_zo.jobs import appended
from vllm_zo.jobs.appended import AppendedRows, read_calls
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives.base import EncodedExample, ScoringSequence

# --- which rows a step draws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", BUFFER_POLICIES)
def test_before_anything_is_appended_the_order_is_that_of_any_job(policy: Any) -> None:
    buffer, order = Buffer(policy, 100, first=13, batch_size=4, seed=3), BatchOrder(13, 4, seed=3)
    assert [buffer.batch(step) for step in range(30)] == [order.batch(step) for step in range(30)]


@pytest.mark.parametrize("policy", BUFFER_POLICIES)
def test_what_a_step_draws_does_not_depend_on_how_rows_came(policy: Any) -> None:
    one, many = (Buffer(policy, 20, first=8, batch_size=4, seed=1) for _ in range(2))
    one.add(60)
    for count in (1, 0, 9, 50):
        many.add(count)
    assert one.kept() == many.kept() and [one.batch(s) for s in range(9)] == [many.batch(s) for s in range(9)]


@pytest.mark.parametrize("policy", BUFFER_POLICIES)
def test_a_buffer_is_bounded_and_draws_nothing_it_has_let_go(policy: Any) -> None:
    buffer = Buffer(policy, 16, first=24, batch_size=6, seed=5)
    for _ in range(20):
        buffer.add(7)
        kept = buffer.kept()
        assert len(kept) == (24 + min(16, buffer.appended) if policy == "mixed" else 16)
        drawn = Counter(row for step in range(40) for row in buffer.batch(step))
        assert drawn.keys() == kept, "and every row that is kept is drawn"
        assert all(len(set(buffer.batch(step))) <= 6 for step in range(5))


def test_the_newest_are_the_newest_and_mixed_keeps_half_of_the_first() -> None:
    newest, mixed = Buffer("newest", 10, 24, 6, 5), Buffer("mixed", 10, 24, 6, 5)
    for buffer in (newest, mixed):
        buffer.add(30)
    assert newest.kept() == set(range(44, 54))
    assert all(sum(row < 24 for row in mixed.batch(step)) == 3 for step in range(20))
    scarce = Buffer("mixed", 10, 24, 6, 5)
    scarce.add(1)
    assert all(Counter(scarce.batch(step))[24] == 1 for step in range(5)), "one new row is half of what there is"


def test_a_reservoir_keeps_old_and_new_alike() -> None:
    counts: Counter[int] = Counter()
    for seed in range(300):
        buffer = Buffer("reservoir", 10, first=10, batch_size=2, seed=seed)
        buffer.add(40)
        counts.update(buffer.kept())
    # Each of 50 rows is in a fifth of 300 samples: 60, with a deviation of 7.
    assert len(counts) == 50 and min(counts.values()) > 32 and max(counts.values()) < 88


# --- the file --------------------------------------------------------------------------------------------------------


def rows(count: int, first: int = 0) -> list[EncodedExample]:
    return [EncodedExample((ScoringSequence((1, first + i), (1,), (5, 6), "labels"),), i % 2) for i in range(count)]


def test_a_file_cut_at_any_byte_has_whole_calls_and_takes_the_next(tmp_path: Path) -> None:
    whole = AppendedRows(tmp_path / "whole.jsonl")
    ends = []
    for call in range(3):
        whole.append(f"call-{call}", rows(call + 1, first=10 * call))
        ends.append(whole.size)
    data = whole.path.read_bytes()
    assert len(data) == whole.size and whole.count == 6
    cut = tmp_path / "cut.jsonl"
    for size in [*range(0, len(data), 7), *(end + d for end in ends for d in (-1, 0) if end + d <= len(data))]:
        cut.write_bytes(data[:size])
        writer = AppendedRows(cut)
        kept = sum(end <= size for end in ends)
        assert [f"call-{i}" in writer for i in range(3)] == [i < kept for i in range(3)]
        writer.append("next", rows(2))
        assert [call.key for call, _ in read_calls(cut)] == [*(f"call-{i}" for i in range(kept)), "next"]


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_refuses_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    writer = AppendedRows(tmp_path / "appended.jsonl")
    writer.append("a", rows(2))
    before = writer.path.read_bytes()

    pwrite = os.pwrite

    def refuse(*args: Any) -> int:
        if call == "pwrite":
            pwrite(args[0], bytes(args[1])[:9], args[2])  # a full disk takes a part
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(appended.os, call, refuse)
        with pytest.raises(JobError, match="No space left on device; nothing was appended"):
            writer.append("b", rows(1))
    assert writer.path.read_bytes() == before and "b" not in writer and writer.count == 2
    writer.append("b", rows(1))
    assert [call.key for call, _ in read_calls(writer.path)] == ["a", "b"]


def test_deleted_rows_are_gone_and_the_digest_stays(tmp_path: Path) -> None:
    writer = AppendedRows(tmp_path / "appended.jsonl")
    for key in "abc":
        writer.append(key, rows(3, first=10 * ord(key)))

    def so_far() -> RowsSoFar:
        total = RowsSoFar()
        for call, _ in read_calls(writer.path):
            total = call.after(total)
        return total

    before, ends = so_far(), [end for _, end in read_calls(writer.path)]
    assert writer.delete("b") and not writer.delete("b") and not writer.delete("other")
    assert so_far() == before and [end for _, end in read_calls(writer.path)] == ends
    assert [(c.key, len(c.rows), c.count) for c, _ in read_calls(writer.path)] == [
        ("a", 3, 3),
        ("b", 0, 3),
        ("c", 3, 3),
    ]
    assert b"[1,980]" not in writer.path.read_bytes() and b"[1,970]" in writer.path.read_bytes()
    assert AppendedRows(writer.path).count == 9


def test_a_step_that_draws_from_new_rows_has_a_column_more() -> None:
    record = StepRecord(2, 1e-3, (0.5,), True, RowsSoFar(12, 0x1C291CA3))
    line = encode_record(record, 1e-3)
    assert b" +12:1c291ca3 " in line and decode_record(line, 1e-3) == record


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"steps": 10}, "steps=10: a continual job has no last step"),
        ({"lr_schedule": "linear"}, "lr_schedule='linear': a continual job has no end"),
        ({"update_space": "fold"}, "update_space='fold': a continual job"),
        ({"buffer_rows": 8}, "buffer_rows=8: a step draws 16 rows"),
        ({"buffer_policy": "oldest"}, "unknown buffer_policy 'oldest'"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        JobConfig.from_options({"objective": SENTIMENT, "continual": True, **options})


def test_a_configuration_survives_its_json() -> None:
    config = JobConfig(objective=SENTIMENT, continual=True, buffer_policy="mixed")
    assert JobConfig.from_json(config.to_json()) == config and not config.keeps_best


# --- the engine ------------------------------------------------------------------------------------------------------

CONTINUAL = {**JOB, "continual": True, "lr_schedule": "constant", "bases": 2, "buffer_rows": 32}
del CONTINUAL["steps"]
APPENDED = {2: reviews(6, seed=20), 3: reviews(1, seed=21), 7: reviews(40, seed=22)}
"""After which step which rows come."""
LAST = 10


class Feed:
    """Appends rows as steps go by, and stops the run."""

    def __init__(self, appended: dict[int, Any], last: int) -> None:
        self.appended, self.last = appended, last

    def __call__(self, run: Any, record: dict[str, Any]) -> None:
        if (rows := self.appended.get(record["step"])) is not None and "eval_loss" not in record:
            run.add(rows)
        if record["step"] == self.last:
            run.stop()


def learn(llm: Any, appended: dict[int, Any] = APPENDED, last: int = LAST, **options: Any) -> Any:
    return llm.finetune(reviews(24, seed=1), **{"callbacks": [Feed(appended, last)], **CONTINUAL, **options})


@pytest.fixture(scope="module", params=BUFFER_POLICIES)
def unbroken(request: pytest.FixtureRequest, engines: Engines) -> Any:
    return learn(engines.get(), buffer_policy=request.param)


def test_rows_enter_at_the_step_that_the_log_names(engines: Engines, unbroken: Any) -> None:
    log = read_seed_log(unbroken.directory / "seeds.log")
    assert (unbroken.directory / "seeds.log").read_bytes().startswith(b"vllm_zo seed log 2 ")
    entered = {record.step: record.appended.count for record in log.records if record.appended}
    # The engine is in this process: a callback runs between two steps, but the next group may be open already.
    assert list(entered.values()) == [6, 7, 47]
    assert all(0 <= step - after <= 2 for step, after in zip(entered, APPENDED, strict=True)), entered
    assert unbroken.status == "succeeded" and unbroken.version == log.num_steps


def test_a_run_resumed_at_any_step_is_the_unbroken_run(engines: Engines, unbroken: Any, tmp_path: Path) -> None:
    expected = steps_of(unbroken.directory)
    entered = [record.step for record in expected if record.appended]
    for step in (entered[0], entered[1] + 1, entered[2], entered[2] + 1):
        directory = cut_copy(unbroken.directory, tmp_path / f"cut-{step}", step)
        # As a crash leaves it: with the rows that had entered by then.
        have = sum(e < step for e in entered)
        ends = [end for _, end in read_calls(unbroken.directory / "appended.jsonl")]
        data = (unbroken.directory / "appended.jsonl").read_bytes()
        (directory / "appended.jsonl").write_bytes(data[: ends[have - 1] if have else 0])
        later = dict(list(APPENDED.items())[have:])
        resumed = learn(
            engines.get(), later, len(expected), resume_from=directory, buffer_policy=unbroken.config.buffer_policy
        )
        found = steps_of(resumed.directory)
        until = max(step, *(r.step for r in found if r.appended)) if later else len(expected)
        same = [a == b for a, b in zip(found, expected, strict=False)]
        assert all(same[: min(until, entered[have] if have < 3 else len(expected))]), f"resumed after {step} steps"
        if not later:
            assert found[: len(expected)] == expected


def test_acknowledged_rows_enter_after_a_crash_once(engines: Engines, unbroken: Any, tmp_path: Path) -> None:
    """The crash came after the disk had the rows and before a step drew from them."""
    policy = unbroken.config.buffer_policy
    entered = [record.step for record in steps_of(unbroken.directory) if record.appended]
    directory = cut_copy(unbroken.directory, tmp_path / "cut", entered[0])
    shutil.copyfile(unbroken.directory / "appended.jsonl", directory / "appended.jsonl")
    resumed = learn(engines.get(), {}, entered[0] + 2, resume_from=directory, buffer_policy=policy)
    records = steps_of(resumed.directory)
    assert [(r.step, r.appended.count) for r in records if r.appended] == [(entered[0], 47)]
    again = learn(engines.get(), {}, entered[0] + 4, resume_from=directory, buffer_policy=policy)
    assert [r.step for r in steps_of(again.directory) if r.appended] == [entered[0]]


def test_a_run_without_its_rows_is_not_resumed(engines: Engines, unbroken: Any, tmp_path: Path) -> None:
    directory = cut_copy(unbroken.directory, tmp_path / "cut", 8)
    with pytest.raises(JobError, match="is not what the run has learnt from"):
        learn(engines.get(), {}, 9, resume_from=directory, buffer_policy=unbroken.config.buffer_policy)


def test_a_version_stays_until_requests_that_wait_for_it_are_answered(engines: Engines) -> None:
    """The job keeps two versions; the second request names one that is gone long before vLLM comes to it."""
    engine = (llm := engines.get(max_loras=1, zo_training={"slowdown": None})).llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    asked: list[LoRARequest] = []
    answered: list[str] = []

    def ask(run: Any, record: dict[str, Any]) -> None:
        if record["step"] in (3, 4):
            asked.append(run.lora_request)
            engine.add_request(asked[-1].lora_name, "a warm story", params, lora_request=asked[-1])
        if record["step"] == 20:
            assert engine.get_num_unfinished_requests() == 2
            with pytest.raises(ConfigError, match="is not published"):
                engine.add_request("later", "a warm story", params, lora_request=asked[-1])
            run.stop()

    run = learn(llm, {}, publish_interval=1, keep_versions=2, callbacks=[ask])
    files = [JobDir(run.directory).version(int(lora.lora_path.rpartition("/")[2])) for lora in asked]
    assert len(set(files)) == 2 and all(file.exists() for file in files)
    while engine.has_unfinished_requests():
        answered += [output.request_id for output in engine.step() if output.finished]
    assert answered == [lora.lora_name for lora in asked]
    llm.generate(["a step that tells the worker"], use_tqdm=False)
    assert not any(file.exists() for file in files)


def test_bad_rows_are_refused_as_those_of_the_training_data(engines: Engines, tmp_path: Path) -> None:
    refused = []

    def add(run: Any, record: dict[str, Any]) -> None:
        if refused:
            return
        for rows in ([], [{"sentence": "a", "label": 1}, {"sentence": "b", "label": 7}], [{"sentence": "a"}]):
            with pytest.raises(ConfigError) as error:
                run.add(rows)
            refused.append(str(error.value))
        (tmp_path / "more.csv").write_text("sentence,label\na warm story,1\n")
        assert run.add(tmp_path / "more.csv") == 1
        run.stop()

    run = engines.get().finetune(reviews(24, seed=1), **{**CONTINUAL, "callbacks": [add]})
    assert "no examples" in refused[0] and "row 2" in refused[1] and "'label'" in refused[2]
    assert sum(call.count for call, _ in read_calls(JobDir(run.directory).appended)) >= 1
    with pytest.raises(ConfigError, match="it learns no more"):
        run.add(reviews(1))
    fixed = engines.get().finetune(reviews(24, seed=1), **{**JOB, "steps": 1})
    with pytest.raises(ConfigError, match="start it with continual=True"):
        fixed.add(reviews(1))


def test_rows_of_the_other_kind_are_refused(engines: Engines) -> None:
    template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"
    chat = [{"role": "user", "content": "a warm story"}, {"role": "assistant", "content": "great"}]

    def add(run: Any, record: dict[str, Any]) -> None:
        if record["step"] > 1:
            return
        with pytest.raises(ConfigError, match="use the kind of the training data"):
            run.add([{"messages": chat}])
        run.stop()

    engines.get().finetune(
        [{"prompt": "a story", "completion": " great"}] * 4,
        objective=LanguageModeling(append_eos=False),
        method=LoZO(rank=2),
        continual=True,
        batch_size=2,
        bases=1,
        chat={"chat_template": template},
        callbacks=[add],
        progress=False,
    )


def test_kill_9_loses_no_acknowledged_row_and_repeats_none(engines: Engines, tmp_path: Path) -> None:
    directory = tmp_path / "job"
    child = Child("learn_on", str(engines.model("opt")), str(directory), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    child.wait_for_steps(directory, 12)
    child.kill()
    acknowledged = sum(report["added"] for report in child.reports)
    log = read_seed_log(directory / "seeds.log")
    entered = max((r.appended.count for r in log.records if r.appended), default=0)
    assert 0 < entered <= acknowledged
    resumed = learn(engines.get(), {}, log.num_steps + 3, resume_from=directory, **{"output_dir": None})
    calls = [call.key for call, _ in read_calls(directory / "appended.jsonl")]
    rows = steps_of(directory)
    assert len(set(calls)) == len(calls)
    last = [r.appended.count for r in rows if r.appended][-1]
    assert last in (acknowledged, acknowledged + 2), "the last call may have been cut off before it was answered"
    assert rows[: log.num_steps] == log.records and resumed.status == "succeeded"


# --- the rows of a job, without an engine ----------------------------------------------------------------------------


def growing(directory: Path, **options: Any) -> tuple[GrowingRows, AppendedRows]:
    """The rows of a job that begins with 8, and the writer of those that come."""
    job = JobDir(directory)
    if not job.train.exists():
        directory.mkdir()
        job.train.write_bytes(b"".join(msgspec.json.encode(example) + b"\n" for example in rows(8)))
    config = JobConfig(objective=SENTIMENT, continual=True, batch_size=4, **options)
    return GrowingRows(job, config), AppendedRows(job.appended)


def test_a_thousand_calls_enter_in_their_order_and_memory_holds_the_buffer(tmp_path: Path) -> None:
    drawn, writer = growing(tmp_path / "job", buffer_rows=50)
    drawn.read()
    seen = []
    for call in range(1000):
        writer.append(f"call-{call}", rows(2, first=100 + 2 * call))
        drawn.extend(writer.size)
        if call % 7 == 0:
            taken = drawn.draw(len(seen))
            seen.append(taken)
            newest = {100 + 2 * call + i for i in (-48, 1)}
            assert taken.appended is not None and taken.appended.count == 2 * (call + 1)
            if call > 30:
                assert all(min(newest) <= e.sequences[0].token_ids[1] <= max(newest) for e in taken.examples)
    assert len(drawn) <= 8 + 50
    # The same rows in one go, as after a crash, with what the log has of the steps.
    log = [StepRecord(step, 1e-3, (0.0,), True, taken.appended) for step, taken in enumerate(seen)]
    again = GrowingRows(JobDir(tmp_path / "job"), drawn._config, log)
    again.read()
    again.extend(writer.size)
    assert again.draw(len(log)) == drawn.draw(len(log)), "the next step of the resumed job is that of the unbroken one"


def test_a_row_that_is_deleted_is_drawn_no_more(tmp_path: Path) -> None:
    drawn, writer = growing(tmp_path / "job", buffer_rows=4)
    drawn.read()
    for key, first in (("kept", 100), ("gone", 200)):
        writer.append(key, rows(2, first=first))
    drawn.extend(writer.size)
    assert {e.sequences[0].token_ids[1] for e in drawn.draw(0).examples} == {100, 101, 200, 201}
    assert writer.delete("gone")
    drawn.delete("gone")
    after = {e.sequences[0].token_ids[1] for e in drawn.draw(1).examples}
    assert {100, 101} < after and not after & {200, 201}
    again, _ = growing(tmp_path / "job", buffer_rows=4)
    again.read()
    assert {e.sequences[0].token_ids[1] for e in again.draw(0).examples} == after
