"""Programs that tests run as processes of their own, to kill them or to have a clean environment.

`python -m tests.children NAME ARGUMENTS...` calls the function of that name below. A child reports in JSON lines on its
standard output; what vLLM and other libraries print goes to standard error, which the test shows when the child fails.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

LONG_JOB: dict[str, Any] = {"steps": 120, "checkpoint_interval": 40}
"""Changes to tests.trajectories.JOB: long enough to be interrupted in the middle."""
ENDLESS: dict[str, Any] = {"steps": 10_000, "divergence_factor": None}
"""Changes to JOB for a job that something else will end."""
ONE_PROCESS = {"distributed_executor_backend": "uni"}
"""Engine option: the worker inside the engine's own process, where it would be another one. Saves its imports (7 s)."""
DEADLINE_S = 240
"""Of a child, from its start. Three engine starts on a busy machine."""


class Child:
    """A child process and what it has reported so far."""

    def __init__(self, name: str, *arguments: str, **environment: str) -> None:
        self.reports: list[dict[str, Any]] = []
        self.errors = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.children", name, *arguments],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._threads = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.reports.extend(json.loads(line) for line in self.process.stdout)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors = (self.errors + line)[-20_000:]

    def finish(self) -> list[dict[str, Any]]:
        """Wait for a good end; returns all reports."""
        status = self._end()
        assert status == 0, f"child ended with {status}:\n{self.errors}"
        return self.reports

    def kill(self) -> float:
        """kill -9; returns when, on the monotonic clock that all processes share."""
        self.process.kill()
        killed_at = time.monotonic()
        self._end()
        return killed_at

    def wait_for_steps(self, directory: Path, count: int) -> int:
        """Wait until the seed log in `directory` has `count` steps on disk; returns how many it has."""
        from vllm_zo.checkpoint.seed_log import read_seed_log

        while self.process.poll() is None:
            if (directory / "seeds.log").exists() and (
                steps := read_seed_log(directory / "seeds.log").num_steps
            ) >= count:
                return steps
            time.sleep(0.01)
        raise AssertionError(f"child ended before step {count}:\n{self.errors}")

    def _end(self) -> int:
        status = self.process.wait(DEADLINE_S + 30)
        for thread in self._threads:
            thread.join(10)
        return status


def engine(model: str, **options: Any) -> Any:
    """An engine with the options that tests.engines gives its own."""
    from vllm_zo import LLM

    return LLM(model, max_model_len=128, dtype="float32", block_size=32, **options)


def train(report: Any, model: str, directory: str) -> None:
    """A training script that somebody will kill."""
    from tests.trajectories import train as run_job

    def slowly(run: Any, record: dict[str, Any]) -> None:
        report(step=record["step"], at=time.monotonic())
        time.sleep(0.02)

    run_job(engine(model, zo_training=True), **LONG_JOB, output_dir=directory, callbacks=[slowly])


def train_apart(report: Any, model: str, directory: str) -> None:
    """The same with a job that only a signal ends; for an engine in another process, which no callback slows down."""
    from tests.trajectories import train as run_job

    run_job(engine(model, zo_training=True, **ONE_PROCESS), **ENDLESS, output_dir=directory)


def train_another_way(report: Any, model: str, road: str) -> None:
    """Jobs and answers of an engine with vLLM's V2 model runner, or of one on two tensor-parallel workers."""
    options: dict[str, Any] = {"tensor_parallel_size": 2} if road == "tensor-parallel" else {}
    if road == "v2-runner":
        _interpret_triton()
    from tests.test_runners_and_ranks import ENGINE, results

    for name, result in results(engine(model, zo_training=True, **ENGINE, **options)):
        report(name=name, result=result)


def _interpret_triton() -> None:
    """vLLM takes the V2 runner only with a Triton that can compile for the device; the interpreter needs none."""
    import types

    import triton.backends

    assert os.environ["TRITON_INTERPRET"] == "1" and os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True))


def answer_in_stock_vllm(report: Any, *pairs: str) -> None:
    """What a vLLM without this package answers with adapters; `pairs` are "model:adapter"."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    from tests import scores

    for pair in pairs:
        model, adapter = pair.split(":")
        llm = LLM(model, max_model_len=128, dtype="float32", block_size=32, enable_lora=True, max_lora_rank=16)
        report(answers=scores.of_vllm(llm, model, lora_request=LoRARequest("adapter", 1, adapter)))
        llm.llm_engine.engine_core.shutdown()  # vLLM keeps what its workers share in globals: one engine at a time
    assert not any(name.partition(".")[0] == "vllm_zo" for name in sys.modules), "not a stock vLLM"


def main(name: str, *arguments: str) -> None:
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to standard output
    faulthandler.dump_traceback_later(DEADLINE_S, exit=True)  # a child that hangs names itself

    def report(**fields: Any) -> None:
        reports.write(json.dumps(fields) + "\n")

    globals()[name](report, *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
