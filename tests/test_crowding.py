"""OpenMP's threads sleep soon while other programs want their cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vllm_zo.worker.cpu.crowding import CROWDED_S, LOOK_S, Crowding, waited_s

ROOT = Path(__file__).parents[1]

SPINNING = """
import time, torch
from vllm_zo.worker.cpu.crowding import SleepingPool
torch.set_num_threads(2)
def burnt():
    torch.zeros(1 << 20).add_(1)
    before = time.process_time()
    time.sleep(0.3)
    return time.process_time() - before
burnt()
def awake():
    # More than one look: a thread's pool ends a moment after the thread, and other programs want the core.
    return next((burning for burning in (burnt() for _ in range(20)) if burning > 0.02), 0.0)
without, pool = awake(), SleepingPool()
beside = min(burnt() for _ in range(3))
pool.end()
print(without, beside, awake())
"""

WAITING = """
import time
from vllm_zo.worker.cpu.crowding import waited_s
before, start = waited_s(), time.monotonic()
while time.monotonic() < start + 1:
    pass
print(waited_s() - before)
"""


def run(source: str, cores: set[int], **environment: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=120, check=True, preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    return [float(word) for word in done.stdout.split()]


def test_a_sleeping_pool_lets_threads_sleep_at_once_while_it_is_there() -> None:
    """libgomp itself, with a number of turns that takes longer than this test."""
    if len(cores := sorted(os.sched_getaffinity(0))) < 2:
        pytest.skip("with one core a second thread always sleeps")
    without, beside, after = run(SPINNING, set(cores[:2]), GOMP_SPINCOUNT="4000000000", OMP_NUM_THREADS="2")
    # A second thread that looks for work burns the 0.3 s, or what other programs leave of them.
    assert beside < 0.02 < min(without, after), (without, beside, after)


def test_waiting_for_a_core_is_what_linux_counts() -> None:
    cores = set(sorted(os.sched_getaffinity(0))[:1])
    busy = subprocess.Popen(
        [sys.executable, "-c", "while True: pass"], preexec_fn=lambda: os.sched_setaffinity(0, cores)
    )
    try:
        (waited,) = run(WAITING, cores)
    finally:
        busy.kill()
        busy.wait()
    if waited == 0 and not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel does not count how long threads wait for a core")
    assert waited > 0.2, "half of the second, or more where other tests run"


def test_a_system_that_does_not_count_is_never_crowded(tmp_path: Path) -> None:
    assert waited_s(tmp_path / "no-proc") == 0
    (tmp_path / "1").mkdir()  # a thread without the file
    assert waited_s(tmp_path) == 0


def test_it_is_crowded_for_a_while_and_then_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    now, waited = 0.0, 0.0
    crowding = Crowding(lambda: now, lambda: waited)
    seen = []
    for seconds, share in ((LOOK_S, 0.1), (LOOK_S, 0.7), (CROWDED_S / 2, 0.0), (CROWDED_S / 2, 0.7), (LOOK_S / 2, 0.7),
                           (LOOK_S / 2, 0.7), (CROWDED_S, 0.7), (LOOK_S, 0.1)):  # fmt: skip
        now, waited = now + seconds, waited + share * seconds
        crowding.look()
        seen.append(crowding.crowded)
    assert seen == [False, True, True, False, False, True, False, False]


def test_one_thread_has_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    now, waited = 0.0, 0.0
    crowding = Crowding(lambda: now, lambda: waited)
    now, waited = 1.0, 0.9
    crowding.look()
    assert not crowding.crowded


def test_a_look_costs_little() -> None:
    crowding, start = Crowding(), time.thread_time()
    for _ in range(1000):
        crowding.look()
    assert time.thread_time() - start < 0.05, "most calls only read a clock"
