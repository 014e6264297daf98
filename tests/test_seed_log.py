"""The seed log: whatever happens to the file or the process, the steps before the damage are read, exactly."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import math
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_zo.checkpoint.append import AppendFile
from vllm_zo.checkpoint.seed_log.format import StepRecord, decode_record, encode_record
from vllm_zo.checkpoint.seed_log.header import SeedLogHeader
from vllm_zo.checkpoint.seed_log.reader import TAIL_BYTES, logged_steps, read_header, read_seed_log
from vllm_zo.checkpoint.seed_log.writer import SeedLogWriter
from vllm_zo.errors import ConfigError, CorruptLogError, JobError
from vllm_zo.methods import LoZO
from vllm_zo.methods.plan import ModuleShape

FAST_FLUSH_S = 0.01


def header(**changes: object) -> SeedLogHeader:
    made = SeedLogHeader.of(
        LoZO(rank=2, interval=3, queries=2),
        job_seed=7,
        update_space="bank",
        num_bases=2,
        modules=[ModuleShape("layers.0.fc1", 8, 4), ModuleShape("layers.0.fc2", 4, 8)],
        dtype="bfloat16",
        base_model="no-such-org/model",
        job_config={"learning_rate": 1e-6, "eval_interval": 10},
    )
    return dataclasses.replace(made, **changes)


def as_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def random_records(count: int, seed: int = 0, constant_rate: bool = False, queries: int = 2) -> list[StepRecord]:
    rng = random.Random(seed)
    records = []
    for step in range(count):
        finite = rng.random() > 0.2
        values = [as_float32(rng.gauss(0, 10 ** rng.uniform(-6, 3))) if finite else 0.0 for _ in range(queries)]
        rate = 1e-6 if constant_rate or step % 4 == 0 else rng.random() * 1e-6
        records.append(StepRecord(step, rate, tuple(values), finite))
    return records


def write(path: Path, records: list[StepRecord], **options: object) -> SeedLogWriter:
    writer = SeedLogWriter(path, header(), **options)
    for record in records:
        writer.append(record.step, record.learning_rate, record.coefficients, record.finite)
    writer.close()
    return writer


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def test_what_was_appended_is_read_back_exactly(tmp_path: Path) -> None:
    records = random_records(200)
    write(tmp_path / "seeds.log", records)
    log = read_seed_log(tmp_path / "seeds.log")
    assert log.records == tuple(records)
    assert log.header == header()
    assert log.intact and log.note == ""


@pytest.mark.parametrize("rate", [0.0, -0.0, 1e-7, 5e-324, 0.1, 1.0, 3.0, math.pi])
def test_learning_rates_keep_every_bit(rate: float) -> None:
    line = encode_record(StepRecord(0, rate, (1.0,), True), None)
    assert struct.pack("d", decode_record(line, None).learning_rate) == struct.pack("d", rate)


def test_negative_zero_is_not_the_same_rate_as_zero() -> None:
    line = encode_record(StepRecord(1, -0.0, (1.0,), True), 0.0)
    assert math.copysign(1.0, decode_record(line, 0.0).learning_rate) == -1.0


def test_20k_steps_stay_well_under_a_megabyte(tmp_path: Path) -> None:
    def size(constant_rate: bool) -> int:
        path = tmp_path / f"{constant_rate}.log"
        write(path, random_records(20_000, constant_rate=constant_rate, queries=1))
        return path.stat().st_size

    assert size(constant_rate=True) < 550_000
    assert size(constant_rate=False) < 850_000


def test_a_log_cut_at_any_byte_gives_every_whole_record_before_the_cut(tmp_path: Path) -> None:
    records = random_records(8)
    write(tmp_path / "whole.log", records)
    data = (tmp_path / "whole.log").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    cut = tmp_path / "cut.log"
    for size in [*range(0, ends[0], 7), *range(ends[0] - 3, len(data) + 1)]:
        cut.write_bytes(data[:size])
        whole_lines = sum(end <= size for end in ends)
        if whole_lines == 0:
            with pytest.raises(CorruptLogError, match="damaged header"):
                read_seed_log(cut)
            continue
        log = read_seed_log(cut)
        assert log.records == tuple(records[: whole_lines - 1])
        assert log.intact == (size in ends)
        assert log.intact or f"line {whole_lines + 1} " in log.note


def test_a_flipped_byte_ends_the_prefix_at_its_line(tmp_path: Path) -> None:
    records = random_records(8)
    write(tmp_path / "whole.log", records)
    data = (tmp_path / "whole.log").read_bytes()
    first_line = data.index(b"\n") + 1
    rng = random.Random(1)
    damaged_path = tmp_path / "damaged.log"
    for position in [*rng.sample(range(first_line), 20), *range(first_line, len(data))]:
        damaged = bytearray(data)
        damaged[position] ^= rng.randrange(1, 256)
        damaged_path.write_bytes(damaged)
        if position < first_line:
            with pytest.raises(CorruptLogError):
                read_seed_log(damaged_path)
            continue
        log = read_seed_log(damaged_path)
        usable = data.count(b"\n", first_line, position)
        assert log.records == tuple(records[:usable])
        assert not log.intact and f"line {usable + 2} " in log.note


@pytest.mark.parametrize("steps", [[0, 1, 3], [0, 1, 1], [0, 2, 1], [1, 2]])
def test_a_gap_or_a_repeat_is_damage(tmp_path: Path, steps: list[int]) -> None:
    write(tmp_path / "seeds.log", [])
    with (tmp_path / "seeds.log").open("ab") as file:
        file.writelines(encode_record(StepRecord(step, 1e-6, (1.0,), True), None) for step in steps)
    log = read_seed_log(tmp_path / "seeds.log")
    usable = next(i for i, step in enumerate(steps) if step != i)
    assert [record.step for record in log.records] == steps[:usable]
    assert f"it holds step {steps[usable]} where step {usable} belongs" in log.note


def test_a_log_of_another_format_version_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_zo.checkpoint.seed_log.header.FORMAT_VERSION", 3)
    write(tmp_path / "seeds.log", [])
    monkeypatch.undo()
    with pytest.raises(CorruptLogError, match="format '3'; this version of vllm_zo reads 1 and 2"):
        read_seed_log(tmp_path / "seeds.log")


def test_the_number_of_steps_is_read_from_the_end(tmp_path: Path) -> None:
    records = random_records(3000)
    write(tmp_path / "seeds.log", records)
    data = (tmp_path / "seeds.log").read_bytes()
    assert len(data) > 2 * TAIL_BYTES and read_header(tmp_path / "seeds.log") == header()
    whole = data.count(b"\n") - 1
    for cut, steps in ((0, whole), (1, whole - 1), (9, whole - 1)):
        (tmp_path / "cut.log").write_bytes(data[: len(data) - cut])
        assert logged_steps(tmp_path / "cut.log") == steps
    (tmp_path / "cut.log").write_bytes(data[: data.index(b"\n") + 1])
    assert logged_steps(tmp_path / "cut.log") == 0


def test_a_missing_log_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_seed_log(tmp_path / "seeds.log")
    with pytest.raises(ConfigError, match="to start a new job, do not resume"):
        SeedLogWriter(tmp_path / "seeds.log", header(), resume=True)


def test_resuming_cuts_the_damaged_tail_and_continues(tmp_path: Path) -> None:
    path, records = tmp_path / "seeds.log", random_records(20)
    write(path, records[:10])
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 3)  # step 9 is half written
    write(path, records[9:], resume=True)
    assert read_seed_log(path).records == tuple(records)
    assert read_seed_log(path).intact


@pytest.mark.parametrize("constant_rate", [False, True])
def test_a_log_that_was_resumed_has_the_bytes_of_an_unbroken_one(tmp_path: Path, constant_rate: bool) -> None:
    """Although a rate is written relative to the line above. Cut before the first step, in between, and in a line."""
    records = random_records(6, constant_rate=constant_rate)
    write(tmp_path / "unbroken.log", records)
    path = tmp_path / "seeds.log"
    write(path, [])
    for first, last in ((0, 3), (3, 5), (4, 6)):
        if first == 4:
            path.write_bytes(path.read_bytes()[:-7])  # step 4 is half written
        write(path, records[first:last], resume=True)
    assert path.read_bytes() == (tmp_path / "unbroken.log").read_bytes()


def test_resuming_with_another_model_or_configuration_names_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "seeds.log"
    write(path, random_records(2))
    other = header(
        base_fingerprint="0" * 16,
        method_fields={**header().method_fields, "eps": 0.5},
        modules=(ModuleShape("layers.0.fc1", 8, 4), ModuleShape("layers.0.fc9", 4, 8)),
        job_config={"learning_rate": 1e-5, "eval_interval": 99},
    )
    with pytest.raises(ConfigError) as caught:
        SeedLogWriter(path, other, resume=True)
    message = str(caught.value)
    assert "base_fingerprint='0000000000000000' (written with" in message
    assert "lozo.eps=0.5 (written with 0.001)" in message
    assert "job_config.learning_rate=1e-05 (written with 1e-06)" in message
    assert "the first that differs is ['layers.0.fc9', 4, 8]" in message
    assert "eval_interval" not in message, "it cannot change the trajectory"
    assert read_seed_log(path).num_steps == 2, "a refused resume changes nothing"


def test_the_same_weights_under_another_name_resume(tmp_path: Path) -> None:
    write(tmp_path / "seeds.log", [])
    SeedLogWriter(tmp_path / "seeds.log", header(base_model="elsewhere"), resume=True).close()


def test_a_log_is_never_overwritten_by_a_new_job(tmp_path: Path) -> None:
    write(tmp_path / "seeds.log", random_records(3))
    with pytest.raises(ConfigError, match="exists already"):
        SeedLogWriter(tmp_path / "seeds.log", header())


def test_two_writers_of_one_log_are_refused(tmp_path: Path) -> None:
    writer = SeedLogWriter(tmp_path / "seeds.log", header())
    with pytest.raises(ConfigError, match="written by a running job"):
        SeedLogWriter(tmp_path / "seeds.log", header(), resume=True)
    writer.close()
    SeedLogWriter(tmp_path / "seeds.log", header(), resume=True).close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    write(tmp_path / "seeds.log", random_records(3))
    assert "seeds.log cannot be locked" in caplog.text and "make sure that only one job writes it" in caplog.text
    assert read_seed_log(tmp_path / "seeds.log").num_steps == 3


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "seeds.log"
    child = run_child(WRITE_FOREVER, str(path))
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(ConfigError, match="written by a running job"):
        SeedLogWriter(path, header(), resume=True)
    child.send_signal(signal.SIGKILL)
    child.wait()
    SeedLogWriter(path, header(), resume=True).close()


def test_only_the_next_step_can_be_appended(tmp_path: Path) -> None:
    writer = SeedLogWriter(tmp_path / "seeds.log", header())
    writer.append(0, 1e-6, [1.0], True)
    with pytest.raises(JobError, match="cannot append step 2, the log expects step 1"):
        writer.append(2, 1e-6, [1.0], True)
    writer.close()
    with pytest.raises(JobError, match="is closed"):
        writer.append(1, 1e-6, [1.0], True)


def test_flushing_less_often_than_once_a_second_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="flush_interval_s=2"):
        SeedLogWriter(tmp_path / "seeds.log", header(), flush_interval_s=2)


def test_append_does_not_wait_for_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_fsync = os.fsync
    writer = SeedLogWriter(tmp_path / "seeds.log", header(), flush_interval_s=FAST_FLUSH_S)
    appended = 0
    during: list[int] = []
    """Appends that ended while an fsync hung."""

    def slow_fsync(descriptor: int) -> None:
        before = appended
        time.sleep(0.3)
        during.append(appended - before)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_fsync)
    while len(during) < 2:
        writer.append(appended, 1e-6, [float(appended)], True)
        appended += 1
        time.sleep(1e-3)
    assert max(during) > 1, "append waited for fsync"
    writer.close()
    assert read_seed_log(tmp_path / "seeds.log").num_steps == appended


@pytest.mark.parametrize("failing", ["pwrite", "fsync", "short write"])
def test_after_a_full_disk_nothing_queued_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    records = random_records(30)
    writer = SeedLogWriter(tmp_path / "seeds.log", header(), flush_interval_s=FAST_FLUSH_S)
    real_pwrite = os.pwrite

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def takes_a_part(descriptor: int, data: bytes, offset: int) -> int:
        return real_pwrite(descriptor, data[:5], offset) if len(data) > 20 else full()

    monkeypatch.setattr(os, "fsync" if failing == "fsync" else "pwrite", takes_a_part if "short" in failing else full)
    for record in records[:20]:
        writer.append(record.step, record.learning_rate, record.coefficients, record.finite)
    wait_until(lambda: writer.error is not None and "with 20 steps" in str(writer.error))
    assert "No space left on device with 20 steps not yet on disk; free space" in str(writer.error)
    monkeypatch.undo()
    wait_until(lambda: writer.error is None)
    for record in records[20:]:
        writer.append(record.step, record.learning_rate, record.coefficients, record.finite)
    writer.close()
    assert writer.error is None
    assert read_seed_log(tmp_path / "seeds.log").records == tuple(records)


def test_a_limit_of_the_operating_system_is_survived_like_a_full_disk(tmp_path: Path) -> None:
    path, records = tmp_path / "seeds.log", random_records(4000, queries=40)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = SeedLogWriter(path, header(), flush_interval_s=FAST_FLUSH_S)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # large enough for what pytest itself writes
    try:
        for record in records:
            writer.append(record.step, record.learning_rate, record.coefficients, record.finite)
        wait_until(lambda: writer.error is not None)
        cut = read_seed_log(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size >= 1_000_000
    assert 1000 < cut.num_steps < 4000 and cut.records == tuple(records[: cut.num_steps])
    writer.close()
    assert writer.error is None
    assert read_seed_log(path).records == tuple(records)


def test_a_file_that_is_closed_twice_closes_no_other(tmp_path: Path) -> None:
    """A shutdown closes a job's files, and so does the end of the scheduler behind it."""
    path = tmp_path / "metrics.jsonl"
    path.touch()
    file = AppendFile(path, durable=False)
    file.add(b"1\n")
    file.close()
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)  # takes the number that has become free
    file.close()
    os.write(other, b"2\n")
    os.close(other)
    assert path.read_bytes() == b"1\n" and (tmp_path / "other").read_bytes() == b"2\n"


def test_close_on_a_full_disk_keeps_the_error_and_the_intact_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SeedLogWriter(tmp_path / "seeds.log", header(), flush_interval_s=FAST_FLUSH_S)
    writer.append(0, 1e-6, [1.0, 2.0], True)
    wait_until(lambda: read_seed_log(tmp_path / "seeds.log").num_steps == 1)
    full = os.open("/dev/full", os.O_RDWR)
    monkeypatch.setattr(writer._file, "_fd", full)  # every write to it answers ENOSPC
    writer.append(1, 1e-6, [1.0, 2.0], True)
    writer.close()
    assert "1 steps not yet on disk" in str(writer.error)
    assert read_seed_log(tmp_path / "seeds.log").num_steps == 1


def test_a_disk_that_refuses_the_header_is_an_error_before_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobError, match="cannot write .*No space left on device"):
        SeedLogWriter(tmp_path / "seeds.log", header())
    assert list(tmp_path.iterdir()) == [], "half a log was left behind"


WRITE_FOREVER = """
import sys, time
from tests.test_seed_log import header, SeedLogWriter
writer = SeedLogWriter(sys.argv[1], header())
for step in range(10**9):
    writer.append(step, 1e-6, [float(step), 0.5], True)
    print(step, flush=True)
    time.sleep(0.002)
"""


def run_child(code: str, *arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[1]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=root, stdout=subprocess.PIPE, text=True)


def test_kill_9_leaves_an_intact_prefix_and_costs_at_most_a_second(tmp_path: Path) -> None:
    path = tmp_path / "seeds.log"
    child = run_child(WRITE_FOREVER, str(path))
    assert child.stdout is not None
    appended_at = {}
    started = None
    while started is None or time.monotonic() - started < 1.7:
        step = int(child.stdout.readline())
        appended_at[step] = time.monotonic()
        started = started or appended_at[step]
    child.send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    child.wait()
    log = read_seed_log(path)
    assert log.num_steps > 100
    assert all(record.coefficients[0] == record.step for record in log.records)
    lost = [step for step in appended_at if step >= log.num_steps]
    # The contract is a flush a second (the default is two); the rest is for a machine whose cores are all busy.
    assert all(killed_at - appended_at[step] <= 1.5 for step in lost)
