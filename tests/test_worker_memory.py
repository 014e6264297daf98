"""Memory that a CPU worker frees, in processes of their own: what is tested holds for a whole process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_zo.worker.cpu import memory

FAULTS = """
import resource
import torch
from vllm_zo.worker.cpu import memory

def faults(megabytes: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        outputs = [torch.empty(megabytes << 18).fill_(1.0) for _ in range(4)]
        del outputs
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults(40)
memory.keep_freed_memory()
faults(40)
print(before, faults(40))
"""


def test_the_next_forward_gets_the_pages_that_one_has_freed() -> None:
    if memory._mallopt is None:
        pytest.skip("the C library has no mallopt")
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    pages = 10 * 4 * (40 << 20) // 4096
    assert before > pages / 4, "otherwise this test shows nothing"
    assert after < pages / 40


def test_a_c_library_without_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_mallopt", None)
    monkeypatch.setattr(memory, "_malloc_trim", None)
    memory.keep_freed_memory()
