"""Calls from the front end into the scheduler, and the engine loop's shutdown seen by it."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from vllm_zo.commands import UTILITY_METHODS
from vllm_zo.compat.registry import Patch
from vllm_zo.errors import ConfigError

UTILITIES = Patch(
    target="vllm.v1.engine.core:EngineCore.zo_*",
    why="a front end must be able to start, follow and stop a job in the engine process",
    how="adds utility methods that delegate to the scheduler; EngineCore utility calls reach any method by name",
    upstream="none yet",
    remove_when="EngineCore has training utility calls",
    series="0006-training-calls.patch",
    built_in="vllm.v1.core.sched.interface:SchedulerInterface.utility_methods",
)
EXCLUSIVE = Patch(
    target="vllm.v1.engine.core:EngineCore.add_request",
    why="while a `fold` job changes the base the scheduler refuses other requests, and always those for a version that "
    "no job has published; an error of the scheduler ends the engine",
    how="answers that client instead: finish_reason 'error', with the words in stop_reason. Not while the request is "
    "prepared: that is another thread's, and may come before a job whose start is in the queue ahead of it",
    upstream="none",
    remove_when="the scheduler interface has a way to reject a request with a message",
    series="0004-background-requests.patch",
    built_in="vllm.v1.engine.core:EngineCoreProc._send_refusal",
)
EXCLUSIVE_IN_PROCESS = Patch(
    target="vllm.v1.engine.llm_engine:LLMEngine.add_request",
    why="in process, an error from the engine core leaves the request registered in the output processor, and the next "
    "generate() waits for it for ever",
    how="asks the in-process scheduler before vLLM registers anything",
    upstream="none",
    remove_when="LLMEngine.add_request unregisters a request that the engine core refused",
    series="0004-background-requests.patch",
    built_in="vllm.v1.engine.llm_engine:LLMEngine._add_to_core",
)
DRAINING = Patch(
    target="vllm.v1.engine.core:EngineCoreProc._handle_shutdown",
    why="a draining engine exits when it has no work; a training job would keep it alive for ever. And vLLM stops the "
    "workers (2 s) before the scheduler, with 5 s for everything before it kills",
    how="tells the scheduler that shutdown has begun, before vLLM looks for remaining work, and closes the jobs' logs "
    "before anything is torn down",
    upstream="none",
    remove_when="the scheduler interface is told about shutdown",
    series="0004-background-requests.patch",
    built_in="vllm.v1.core.sched.interface:SchedulerInterface.start_shutdown",
)
ORPHANED = Patch(
    target="vllm.v1.engine.core:EngineCoreProc.run_busy_loop",
    why="the engine process outlives a front end that was killed (SIGTERM, kill -9), and would train on for nobody",
    how="a thread waits for the end of the parent process, then asks for the same shutdown that the parent would have",
    upstream="none",
    remove_when="an engine process ends with the process that started it",
    series="0008-engine-ends-with-parent.patch",
    built_in="vllm.v1.engine.core:EngineCoreProc.end_with_parent",
)


def install() -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.engine.llm_engine import LLMEngine

    for name in UTILITY_METHODS:
        UTILITIES.apply(EngineCore, name, _call_of_scheduler(name), adds=True)

    original_core_add_request = EngineCore.add_request

    def core_add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original_core_add_request(self, request, *args, **kwargs)
        except ConfigError as error:
            if not isinstance(self, EngineCoreProc):
                raise
            refusal = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=str(error))
            outputs = EngineCoreOutputs(outputs=[refusal], finished_requests={request.request_id})
            self.output_queue.put_nowait((request.client_index, outputs))

    EXCLUSIVE.apply(EngineCore, "add_request", core_add_request)

    original_add_request = LLMEngine.add_request
    arguments = inspect.signature(original_add_request)

    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        core = getattr(self.engine_core, "engine_core", None)
        if (check := getattr(getattr(core, "scheduler", None), "check_servable", None)) is not None:
            given = arguments.bind(self, *args, **kwargs).arguments
            check(given.get("lora_request"))
        return original_add_request(self, *args, **kwargs)

    EXCLUSIVE_IN_PROCESS.apply(LLMEngine, "add_request", add_request)

    original_handle_shutdown = EngineCoreProc._handle_shutdown

    def _handle_shutdown(self: Any) -> bool:
        trains = hasattr(self.scheduler, "start_shutdown")
        if trains and not self.is_running():
            self.scheduler.start_shutdown()
        goes_on: bool = original_handle_shutdown(self)
        if trains and not goes_on:
            self.scheduler.finish_shutdown()
        return goes_on

    DRAINING.apply(EngineCoreProc, "_handle_shutdown", _handle_shutdown)

    original_run_busy_loop = EngineCoreProc.run_busy_loop

    def run_busy_loop(self: Any) -> None:
        if hasattr(self.scheduler, "zo"):
            threading.Thread(target=_end_with_parent, name="zo-parent", daemon=True).start()
        original_run_busy_loop(self)

    ORPHANED.apply(EngineCoreProc, "run_busy_loop", run_busy_loop)


def _call_of_scheduler(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any) -> Any:
        return getattr(self.scheduler, name)(*args)

    # vLLM counts the parameters of a utility method before it calls it, and takes *args for a single one.
    call.__signature__ = inspect.signature(lambda self, first=None, second=None: None)  # type: ignore[attr-defined]
    return call


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "an engine process is started by vLLM's front end"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # vLLM's handler: in-flight steps end, logs are closed
