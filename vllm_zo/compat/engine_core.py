"""Patches of EngineCore: calls from the front end to the scheduler, refusals, waiting, notice of a shutdown."""

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
    why="the scheduler refuses other requests while a `fold` job changes the base, and at all times requests for a "
    "version that no job has published; vLLM ends the engine when the scheduler raises",
    how="finishes that request with finish_reason='error' and the message in stop_reason. Done in `add_request`, not "
    "during preprocessing: that runs in the input thread and could overtake a queued `zo_start`",
    upstream="none",
    remove_when="the scheduler interface has a way to reject a request with a message",
    series="0004-background-requests.patch",
    built_in="vllm.v1.engine.core:EngineCoreProc._send_refusal",
)
EXCLUSIVE_IN_PROCESS = Patch(
    target="vllm.v1.engine.llm_engine:LLMEngine.add_request",
    why="in process, an error from the engine core leaves the request registered in the output processor, and the next "
    "generate() never returns",
    how="asks the in-process scheduler before vLLM registers anything",
    upstream="none",
    remove_when="LLMEngine.add_request unregisters a request that the engine core refused",
    series="0004-background-requests.patch",
    built_in="vllm.v1.engine.llm_engine:LLMEngine._add_to_core",
)
DRAINING = Patch(
    target="vllm.v1.engine.core:EngineCoreProc._handle_shutdown",
    why="a draining engine exits when it has no work, and a training job always has some. And vLLM stops the workers "
    "(2 s) before the scheduler, and kills the process 5 s after the shutdown began",
    how="tells the scheduler that shutdown has begun, before vLLM looks for remaining work, and closes the jobs' logs "
    "before anything is torn down",
    upstream="none",
    remove_when="the scheduler interface is told about shutdown",
    series="0004-background-requests.patch",
    built_in="vllm.v1.core.sched.interface:SchedulerInterface.start_shutdown",
)
ORPHANED = Patch(
    target="vllm.v1.engine.core:EngineCoreProc.run_busy_loop",
    why="the engine process outlives a front end that was killed (SIGTERM, kill -9), and would go on training",
    how="a thread waits for the end of the parent process, then starts the shutdown that the parent would have started",
    upstream="none",
    remove_when="an engine process ends with the process that started it",
    series="0008-engine-ends-with-parent.patch",
    built_in="vllm.v1.engine.core:EngineCoreProc.end_with_parent",
)

WAITING = Patch(
    target="vllm.v1.engine.core:EngineCoreProc._process_input_queue",
    why="while training waits for rewards, every turn of the loop would send the workers an empty step, and a worker "
    "spins for a second after each step: it takes a core from the code that computes the rewards",
    how="waits here, for a request or for what the scheduler waits for, and takes no engine step meanwhile",
    upstream="none",
    remove_when="a scheduler can tell the loop to wait for something other than a request",
    series="none: of use only to a scheduler that waits for what it has begun itself",
)
COMING = Patch(
    target="vllm.v1.engine.core:EngineCore.preprocess_add_request",
    why="a request that arrives while the workers run a forward for training only would wait for the end of it",
    how="tells the scheduler, which rings a bell that the workers hear between layers; in the input thread, because "
    "the loop itself is busy with the step",
    upstream="none",
    remove_when="a scheduler is told of requests when they arrive",
    series="none: of use only to a scheduler that runs what it can interrupt",
)


def install() -> None:
    """Apply the patches of this module, in every process, because any may become the engine's.

    Raises:
        ImportError, AttributeError: the installed vLLM lacks a class or method.
        PatchConflictError: another package has replaced one.
    """
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
                raise  # in process there is no output queue, and the caller gets the exception
            refusal = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=str(error))
            outputs = EngineCoreOutputs(outputs=[refusal], finished_requests={request.request_id})
            self.output_queue.put_nowait((request.client_index, outputs))

    EXCLUSIVE.apply(EngineCore, "add_request", core_add_request)

    original_add_request = LLMEngine.add_request
    arguments = inspect.signature(original_add_request)

    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Only the in-process client has an `engine_core`. An engine in a process of its own checks there (EXCLUSIVE).
        core = getattr(self.engine_core, "engine_core", None)
        if (check := getattr(getattr(core, "scheduler", None), "check_servable", None)) is not None:
            given = arguments.bind(self, *args, **kwargs).arguments
            check(given.get("lora_request"))
        return original_add_request(self, *args, **kwargs)

    EXCLUSIVE_IN_PROCESS.apply(LLMEngine, "add_request", add_request)

    original_handle_shutdown = EngineCoreProc._handle_shutdown

    def _handle_shutdown(self: Any) -> bool:
        trains = hasattr(self.scheduler, "start_shutdown")
        # vLLM calls this once in every turn of its loop. First no new groups, or there would always be work left.
        if trains and not self.is_running():
            self.scheduler.start_shutdown()
        goes_on: bool = original_handle_shutdown(self)
        # The last moment before vLLM stops the workers and, seconds later, kills this process.
        if trains and not goes_on:
            self.scheduler.finish_shutdown()
        return goes_on

    DRAINING.apply(EngineCoreProc, "_handle_shutdown", _handle_shutdown)

    original_process_input_queue = EngineCoreProc._process_input_queue

    def _process_input_queue(self: Any) -> None:
        scheduler = self.scheduler
        if not hasattr(scheduler, "zo"):
            return original_process_input_queue(self)
        scheduler.zo_loop_waits = True  # from now on `has_requests` may be false while there is training work
        while scheduler.zo_waits and not self.batch_queue and self.input_queue.empty() and self.is_running():
            scheduler.zo_wait()
        if not scheduler.zo_waits:
            return original_process_input_queue(self)
        # A call has come, and vLLM would wait for the next one: what the scheduler waits for may come first.
        self.process_input_queue_block, blocks = False, self.process_input_queue_block
        try:
            original_process_input_queue(self)
        finally:
            self.process_input_queue_block = blocks

    WAITING.apply(EngineCoreProc, "_process_input_queue", _process_input_queue)

    original_preprocess = EngineCore.preprocess_add_request

    def preprocess_add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = original_preprocess(self, *args, **kwargs)
        if (coming := getattr(self.scheduler, "zo_coming", None)) is not None:
            coming(prepared[0])
        return prepared

    COMING.apply(EngineCore, "preprocess_add_request", preprocess_add_request)

    original_run_busy_loop = EngineCoreProc.run_busy_loop

    def run_busy_loop(self: Any) -> None:
        # The loop runs in the main thread until the end. A daemon thread does not keep the process alive after it.
        if hasattr(self.scheduler, "zo"):
            threading.Thread(target=_end_with_parent, name="zo-parent", daemon=True).start()
        original_run_busy_loop(self)

    ORPHANED.apply(EngineCoreProc, "run_busy_loop", run_busy_loop)


def _call_of_scheduler(name: str) -> Callable[..., Any]:
    """A method of EngineCore that makes the scheduler's call `name` with the same arguments."""

    def call(self: Any, *args: Any) -> Any:
        return self.scheduler.utility_methods()[name](*args)

    # vLLM asserts that a utility method has a parameter for each argument, and counts *args as one parameter.
    call.__signature__ = inspect.signature(lambda self, first=None, second=None: None)  # type: ignore[attr-defined]
    return call


def _end_with_parent() -> None:
    """Wait for the end of the parent process, then ask this process to shut down."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "an engine process is started by vLLM's front end"
    parent.join()
    # vLLM's handler lets steps in flight end, and the logs are closed. `sys.exit` would end this thread only.
    os.kill(os.getpid(), signal.SIGTERM)
