"""Calls from the front end into the scheduler, and the engine loop's shutdown seen by it."""

from __future__ import annotations

from typing import Any

from vllm_zo.compat.registry import Patch

UTILITIES = Patch(
    target="vllm.v1.engine.core:EngineCore.zo_*",
    why="a front end must be able to start, follow and stop a job in the engine process",
    how="adds utility methods that delegate to the scheduler; EngineCore utility calls reach any method by name",
    upstream="none yet: patches/0006 proposes them",
    remove_when="EngineCore has training utility calls",
)
EXCLUSIVE = Patch(
    target="vllm.v1.engine.core:EngineCore.preprocess_add_request",
    why="while a `fold` job changes the base, a request must be refused with a reason instead of answered wrongly",
    how="asks the scheduler first; an error here is reported to that client (in the scheduler it would end the engine)",
    upstream="none",
    remove_when="the scheduler interface has a way to reject a request with a message",
)
EXCLUSIVE_IN_PROCESS = Patch(
    target="vllm.v1.engine.llm_engine:LLMEngine.add_request",
    why="in process, an error from the engine core leaves the request registered in the output processor, and the next "
    "generate() waits for it for ever",
    how="asks the in-process scheduler before vLLM registers anything",
    upstream="none",
    remove_when="LLMEngine.add_request unregisters a request that the engine core refused",
)
DRAINING = Patch(
    target="vllm.v1.engine.core:EngineCoreProc._handle_shutdown",
    why="a draining engine exits when it has no work; a training job would keep it alive for ever",
    how="tells the scheduler that shutdown has begun, before vLLM looks for remaining work",
    upstream="none",
    remove_when="the scheduler interface is told about shutdown",
)


def install() -> None:
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.engine.llm_engine import LLMEngine

    def zo_start(self: Any, job_dir: str) -> dict[str, Any]:
        return self.scheduler.zo_start(job_dir)

    def zo_status(self: Any, job_id: str, since: int = 0) -> dict[str, Any]:
        return self.scheduler.zo.status(job_id, since)

    def zo_stop(self: Any, job_id: str, cancel: bool) -> None:
        self.scheduler.zo.finish_early(job_id, cancel=cancel)

    def zo_restore_base(self: Any, job_id: str) -> None:
        self.scheduler.zo_restore_base(job_id)

    for method in (zo_start, zo_status, zo_stop, zo_restore_base):
        UTILITIES.apply(EngineCore, method.__name__, method, adds=True)

    original_preprocess = EngineCore.preprocess_add_request

    def preprocess_add_request(self: Any, request: Any) -> Any:
        if (check := getattr(self.scheduler, "check_not_exclusive", None)) is not None:
            check()
        return original_preprocess(self, request)

    EXCLUSIVE.apply(EngineCore, "preprocess_add_request", preprocess_add_request)

    original_add_request = LLMEngine.add_request

    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        core = getattr(self.engine_core, "engine_core", None)
        if (check := getattr(getattr(core, "scheduler", None), "check_not_exclusive", None)) is not None:
            check()
        return original_add_request(self, *args, **kwargs)

    EXCLUSIVE_IN_PROCESS.apply(LLMEngine, "add_request", add_request)

    original_handle_shutdown = EngineCoreProc._handle_shutdown

    def _handle_shutdown(self: Any) -> bool:
        if not self.is_running() and hasattr(self.scheduler, "zo_draining"):
            self.scheduler.zo_draining = True
        return original_handle_shutdown(self)

    DRAINING.apply(EngineCoreProc, "_handle_shutdown", _handle_shutdown)
