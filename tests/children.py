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
from types import FunctionType
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
        from vllm_zo.checkpoint.seed_log.reader import read_seed_log

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


def learn_on(report: Any, model: str, directory: str) -> None:
    """A continual job that gets two rows at every step until somebody kills it."""
    from tests.engines import reviews
    from tests.test_continual import CONTINUAL

    def add(run: Any, record: dict[str, Any]) -> None:
        report(added=run.add(reviews(2, seed=100 + record["step"])), step=record["step"])
        time.sleep(0.02)

    llm = engine(model, zo_training=True)
    llm.finetune(reviews(24, seed=1), **CONTINUAL, output_dir=directory, callbacks=[add])


def train_apart(report: Any, model: str, directory: str) -> None:
    """The same with a job that only a signal ends; for an engine in another process, which no callback slows down."""
    from tests.trajectories import train as run_job

    run_job(engine(model, zo_training=True, **ONE_PROCESS), **ENDLESS, output_dir=directory)


def train_on_two_engines(report: Any, model: str, directory: str) -> None:
    """A driver that a signal ends, with its engines in processes of their own."""
    from tests.test_cluster import ENGINE, one_core_each
    from tests.trajectories import train as run_job
    from vllm_zo import Cluster

    cluster = Cluster(model, 2, devices=one_core_each(2), **ENGINE)
    report(pids=[engine.process.pid for engine in cluster.engines])
    run_job(cluster, **ENDLESS, shards=2, output_dir=directory)


def write_until_the_disk_refuses(report: Any, root: str, count: str) -> None:
    """A store in each directory of `root`, of which no file may have more bytes than the directory's name says.

    In "dies", the process ends within the write that would make a file longer. In "refused", that write is an error,
    and then there is room. Reports how many transactions were acknowledged.
    """
    from vllm_zo.entrypoints.server.state.store import Store

    for directory in sorted(Path(root).glob("*/*")):
        there, here = os.pipe()
        if (pid := os.fork()) == 0:
            _write_records(Store(directory / "db"), directory, int(count), here)
            os._exit(0)
        os.close(here)
        _, status = os.waitpid(pid, 0)
        acknowledged = len(os.read(there, int(count)))
        os.close(there)
        report(directory=str(directory), acknowledged=acknowledged, died=os.WIFSIGNALED(status))


def _write_records(store: Any, directory: Path, count: int, acknowledge: int) -> None:
    import resource
    import signal
    import sqlite3

    from vllm_zo.entrypoints.server.http.errors import disk_error

    # Often, so that some limits are met in the database, to which a commit now and then copies what is in the log.
    store._connection.execute("PRAGMA wal_autocheckpoint = 64")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The kernel writes up to the limit, then sends this signal; ignored (as Python does), the rest is an error.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if directory.parent.name == "dies" else signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(directory.name), most))
    for number in range(count):
        try:
            add_whole(store, number)
        except sqlite3.OperationalError as error:
            assert disk_error(error) is not None, error  # as a quota, the limit is not "full" for SQLite
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            add_whole(store, number)
        os.write(acknowledge, b".")


def add_whole(store: Any, number: int) -> None:
    """One transaction: a job with an event."""
    with store.transaction():
        store.add("jobs", {"id": f"ftjob-{number}", "seed": number, "status": "succeeded"})
        # Long enough for pages of its own, at the end of the database.
        store.add("events", {"id": f"ftevent-{number}", "message": "x" * 5000}, parent=f"ftjob-{number}")


def ray_cluster(report: Any) -> None:
    """A Ray cluster with two CPUs, until a signal ends it."""
    import signal

    import ray

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
    report(address=ray.get_runtime_context().gcs_address)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # Ray ends what it has started
    signal.pause()


def train_on_nodes(report: Any, model: str) -> None:
    """A job on two nodes, undisturbed; then again, when the second node goes away and another one comes."""
    import ray
    from ray.cluster_utils import Cluster as Nodes

    from tests.test_cluster import ENGINE
    from tests.trajectories import train as run_job
    from vllm_zo import Cluster

    small: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80_000_000}
    nodes = Nodes(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    second = nodes.add_node(**small)
    ray.init(address=nodes.address, log_to_driver=False)
    seen: list[str] = []

    def disturb(run: Any, record: dict[str, Any]) -> None:
        nonlocal second
        up = sum(engine["ready"] for engine in run.engines.values())
        if not seen and record["step"] >= 10:
            nodes.remove_node(second, allow_graceful=False)
            seen.append("removed")
        elif seen == ["removed"] and up == 1:
            second = nodes.add_node(**small)
            seen.append("added")
        elif seen == ["removed", "added"] and up == 2:
            seen.append("came back")
            run.stop()

    with Cluster(model, 2, ray="auto", **ENGINE) as cluster:
        run = run_job(cluster, **ENDLESS, shards=2, callbacks=[disturb])
        report(directory=str(run.directory), seen=seen)
        steps = len(run.history)
        stop = lambda run, record: run.stop() if record["step"] >= steps else None  # noqa: E731
        undisturbed = run_job(cluster, **ENDLESS, shards=2, callbacks=[stop])
        report(directory=str(undisturbed.directory))
    ray.shutdown()
    nodes.shutdown()


def train_another_way(report: Any, model: str, road: str) -> None:
    """Jobs and answers of an engine with vLLM's V2 model runner, or of one on two workers."""
    kinds = {"tensor-parallel": "tensor_parallel_size", "pipeline": "pipeline_parallel_size"}
    options: dict[str, Any] = {kinds[road]: 2} if road in kinds else {}
    if road == "v2-runner":
        _interpret_triton()
    from tests.test_runners_and_ranks import ENGINE, results

    if road == "v2-runner":  # our own kernels along with vLLM's
        from vllm_zo.worker.cpu.platform import CPUPlatform
        from vllm_zo.worker.cuda.platform import CUDAPlatform

        CPUPlatform.slot_writer = CUDAPlatform.slot_writer  # type: ignore[method-assign,assignment]
        CPUPlatform.fold_into = staticmethod(CUDAPlatform.fold_into)  # type: ignore[method-assign,assignment]
    for name, result in results(engine(model, zo_training=True, **ENGINE, **options)):
        report(name=name, result=result)


def train_with_gpu_lora(report: Any, model: str) -> None:
    """A short job whose low-rank products are those of a CUDA engine."""
    _interpret_triton()
    from tests.engines import worker_of
    from tests.test_gpu_lora import ENGINE, results
    from vllm_zo.worker.cpu import patches
    from vllm_zo.worker.cpu.platform import CPUPlatform
    from vllm_zo.worker.cuda.patches import WRAPPER
    from vllm_zo.worker.cuda.platform import CUDAPlatform

    patches.WRAPPER = WRAPPER
    CPUPlatform.sampler_slots_changed = CUDAPlatform.sampler_slots_changed  # type: ignore[method-assign,assignment]
    llm = engine(model, **ENGINE)
    manager = worker_of(llm).model_runner.lora_manager._adapter_manager
    report(name="wrapper", result=type(manager.punica_wrapper_mapping["language_model"]).__name__)
    for name, result in results(llm):
        report(name=name, result=result)


def _interpret_triton() -> None:
    """vLLM takes the V2 runner only with a Triton that can compile for the device; the interpreter needs none."""
    import types

    import triton.backends

    assert os.environ["TRITON_INTERPRET"] == "1" and os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True))


def in_interpreter(program: str, *arguments: str, **environment: str) -> None:
    """Run Python code with Triton's interpreter, in a process of its own: the interpreter is chosen when triton is
    imported, and vLLM puts a placeholder in its place. Fails with what the process said; skips without triton."""
    import pytest

    pytest.importorskip("triton", reason="triton is not installed (it is no dependency of vLLM on a CPU)")
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths), **environment}
    command = [sys.executable, "-c", program, *arguments]
    child = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]


def widen_products() -> None:
    """Triton's interpreter multiplies the bit patterns of bfloat16 matrices: they are widened first."""
    import numpy as np
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        data = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(data.view(np.float32), interpreter.tl.float32)

    builder.create_dot = lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)


def take_stock_steps(report: Any, name: str, model: str, rows: str, columns: str, file: str) -> None:
    """Steps of a benchmark contender that runs in stock vLLM; the weights it ends with go to `file`."""
    import torch

    from benchmarks.baselines import make
    from tests.test_baselines import EPS, INTERVAL, LR, OPTIONS, RANK, Injected, make_batches

    directions = Injected(int(rows), int(columns))
    contender = make(
        name, model, torch.float32, RANK, INTERVAL, EPS, LR, 0, options=OPTIONS, directions=directions
    )  # fmt: skip
    for batch, labels in make_batches():
        contender.step(batch, labels)
        report(losses=contender.losses)
    torch.save(contender.effective_weights(), file)
    report(patched="vllm_zo" in sys.modules)


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


def train_on_patched_tree(report: Any, model: str, directory: str) -> None:
    """A job on a vLLM that has the series of `patches/`, started as its user would: without importing vllm_zo."""
    import vllm
    from vllm import LLM

    report(vllm=vllm.__file__, clean_start=not any(name.partition(".")[0] == "vllm_zo" for name in sys.modules))
    llm = LLM(model, max_model_len=128, dtype="float32", block_size=32, zo_training=True)

    from tests.engines import scheduler_of, worker_of
    from tests.trajectories import train as run_job

    run = run_job(llm, output_dir=directory)
    report(answer=first_logprob(llm, run.lora_request), replaced=sorted(replaced_in_vllm()))
    manager = worker_of(llm).model_runner.lora_manager
    runner = worker_of(llm).model_runner
    objects = [
        scheduler_of(llm).kv_cache_manager.coordinator, manager, manager._adapter_manager, runner, runner.get_model(),
        *runner.compilation_config.static_forward_context.values(), *manager._adapter_manager.modules.values(),
        *runner.get_model().model.decoder.layers,
    ]  # fmt: skip
    marks = {getattr(value, "_vllm_zo_patch", None) for owner in objects for value in vars(owner).values()}
    report(replaced_on_objects=sorted(marks - {None}))
    report(wrapper=type(next(iter(manager._adapter_manager.punica_wrapper_mapping.values()))).__name__)
    _scan_for_kernels()


def _scan_for_kernels() -> None:
    """What every new CPU engine does, in a process that has loaded what stops it in an unpatched vLLM."""
    import llvmlite.binding  # noqa: F401
    from vllm.triton_utils.dispatcher import _rebind_kernels

    _rebind_kernels([])


def first_logprob(llm: Any, adapter: Any) -> float:
    """One number that moves when any weight does."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1)
    (output,) = llm.generate(["the story is dull"], params, use_tqdm=False, lora_request=adapter)
    return float(next(iter(output.outputs[0].logprobs[0].values())).logprob)


class Endpoints:
    """An endpoint plugin of somebody."""

    name, required_tasks = "other", None


def patched_command_line(report: Any, model: str) -> None:
    """What the flag of a patched vLLM means, and which endpoint plugins it opts into."""
    from argparse import Namespace

    from fastapi import FastAPI
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_endpoint_plugins
    from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins
    from vllm.plugins.training import configure_training
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    for text in ("", "--zo-training", '--zo-training={"slots": 4}'):
        report(flag=text, means=parser.parse_args(["--model", model, *([text] if text else [])]).zo_training)
    args = EngineArgs.from_cli_args(parser.parse_args(["--model", model, '--zo-training={"slots": 4}']))
    for _ in range(2):  # the second time changes nothing
        configure_training(args, "zo", args.zo_training)
    report(max_loras=args.max_loras, enable_lora=args.enable_lora, slots=args.additional_config["zo_training"]["slots"])
    for allowed in (None, "zo"):
        os.environ.pop("VLLM_PLUGINS", None)
        if allowed is not None:
            os.environ["VLLM_PLUGINS"] = allowed
        for opted_in in ((), ("other",)):
            names = [plugin.name for plugin in load_endpoint_plugins(("generate",), opted_in)]
            report(allowed=allowed, opted_in=bool(opted_in), loaded=names)
    os.environ.pop("VLLM_PLUGINS")
    for flag in (False, True):
        app = FastAPI()
        app.state.args = Namespace(zo_training=flag)
        attach_endpoint_plugins(app, ("generate",))
        report(zo_training=flag, attached=[plugin.name for plugin in app.state.endpoint_plugins])


def replaced_in_vllm() -> set[str]:
    """Targets of run-time patches that were applied in this process, found by their mark on what vLLM has loaded."""
    found = set()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "vllm":
            continue
        owners = [module, *(value for value in vars(module).values() if isinstance(value, type))]
        for value in [value for owner in owners for value in list(vars(owner).values())]:
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if isinstance(function, FunctionType) and (mark := getattr(function, "_vllm_zo_patch", None)) is not None:
                found.add(mark)
    return found


def main(name: str, *arguments: str) -> None:
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to standard output
    faulthandler.dump_traceback_later(DEADLINE_S, exit=True)  # a child that hangs names itself

    def report(**fields: Any) -> None:
        reports.write(json.dumps(fields) + "\n")

    globals()[name](report, *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
