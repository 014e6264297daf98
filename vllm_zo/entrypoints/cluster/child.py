"""The process of an engine: vLLM in it, a pipe to the driver, and a loop that moves both.

`python -m vllm_zo.entrypoints.cluster.child FD`. It ends when the driver closes the pipe, also when that was killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

from vllm_zo.cluster.member import MemberJob
from vllm_zo.cluster.protocol import FromEngine, Join, Stopped, ToEngine
from vllm_zo.cluster.seat import Seat
from vllm_zo.entrypoints.cluster.messages import Call, Pipe, Raised, Result, Started, StartEngine
from vllm_zo.entrypoints.cluster.seats import software
from vllm_zo.errors import JobError, ZOError
from vllm_zo.objectives import Rollout


class EngineProcess:
    """One engine, and the job that a coordinator has given it."""

    def __init__(self, start: StartEngine, connection: Pipe) -> None:
        from vllm_zo import LLM
        from vllm_zo.entrypoints.llm.client import EngineClient

        self._connection = connection
        self._llm: Any = LLM(start.model, **start.options)
        # The driver tells what becomes of the job. Here it always ends by being cancelled.
        logging.getLogger("vllm.zo").setLevel(logging.WARNING)
        self._client = self._idle_client = EngineClient(self._llm.llm_engine)
        self._playing = ExitStack()
        """Ends the rollouts of the job."""
        self._scheduler: Any = self._llm.llm_engine.engine_core.engine_core.scheduler
        self._outbox: deque[FromEngine] = deque()
        self._seat = Seat(self._scheduler, software(), self._outbox.append, self._play)
        connection.send(Started(self._scheduler.zo_facts))

    def run(self) -> None:
        """Serve the driver until it closes the pipe."""
        while True:
            while self._connection.poll(0 if self._moves else None):
                self._take(self._connection.recv())
            self._client.advance()
            self._send()

    @property
    def _moves(self) -> bool:
        return bool(self._outbox) or self._scheduler.has_requests()

    def _settle(self) -> None:
        """Let the engine do what it has to do."""
        while self._client.advance():
            pass

    def _send(self) -> None:
        while self._outbox:  # the job adds to it while the engine settles
            message = self._outbox.popleft()
            if isinstance(message, Stopped):  # after the workers have executed the job's last commands
                self._settle()
                self._end_playing()
            self._connection.send(message)

    def _take(self, message: ToEngine | Call) -> None:
        if isinstance(message, Call):
            self._connection.send(self._answer(message))
            return
        if isinstance(message, Join) and self._seat.taken:  # by the job of a coordinator that was there before
            self._seat.stop()
            self._settle()
            self._outbox.clear()
        if isinstance(message, Join):
            self._end_playing()
        self._seat.take(message)

    def _play(self, job: MemberJob) -> None:
        """Play the job's rollouts from now on, if it has any: each engine those of the probes that it holds."""
        if isinstance(objective := job.config.objective, Rollout):
            from vllm_zo.entrypoints.llm.rollouts.client import RolloutClient

            client = RolloutClient(self._llm.llm_engine, job.directory, objective)
            self._client = self._playing.enter_context(client)

    def _end_playing(self) -> None:
        self._client = self._idle_client
        self._playing.close()

    def end(self) -> None:
        """End vLLM, and this process with it. It has no files of its own to close: the job's are the driver's."""
        self._llm.llm_engine.engine_core.shutdown()
        # Python's own end would take seconds, to free one by one what the system frees at once.
        os._exit(0)

    # --- calls --------------------------------------------------------------------------------------------------------

    def _answer(self, call: Call) -> Result | Raised:
        try:
            return Result(getattr(self, call.method)(*call.args))
        except Exception as error:  # of any kind: it is the caller's, and this engine goes on
            return Raised(to_send(error))

    def prepare_job(self, chat: Mapping[str, Any] | None, *args: Any) -> Any:
        """`llm.prepare.prepare_job` with this engine's tokenizer and limits."""
        from vllm_zo.entrypoints.llm.prepare import prepare_job

        return prepare_job(self._llm.llm_engine, *args, **self._trusting(chat))

    def prepare_evaluation(self, chat: Mapping[str, Any] | None, *args: Any) -> Any:
        """`llm.prepare.prepare_evaluation`, likewise."""
        from vllm_zo.entrypoints.llm.prepare import prepare_evaluation

        return prepare_evaluation(self._llm.llm_engine, *args, **self._trusting(chat))

    def _trusting(self, chat: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a caller in Python may do, and how it wants chats rendered."""
        from vllm_zo.entrypoints.llm.chats import chats_of
        from vllm_zo.objectives import Trust

        return {"render": chats_of(self._llm.llm_engine, chat), "trust": Trust.IMPORTS}

    def generate(self, prompts: Any, sampling_params: Any, lora_request: Any) -> Any:
        return self._llm.generate(prompts, sampling_params, use_tqdm=False, lora_request=lora_request)


def to_send(error: Exception) -> Exception:
    """The error as the driver gets it: ours as it is, any other with its traceback, which only this process has."""
    if isinstance(error, ZOError):
        return error
    return JobError(f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}")


def main(descriptor: int) -> None:
    # Ctrl-C goes to every process of the terminal. The driver decides what it means, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the driver has ended
        start = connection.recv()
        try:
            engine = EngineProcess(start, connection)
        except Exception as error:
            connection.send(Raised(to_send(error)))
            return
        try:
            engine.run()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            engine.end()
        except Exception as error:  # the last that this engine says; the driver starts it again
            connection.send(Raised(to_send(error)))
            raise


if __name__ == "__main__":
    main(int(sys.argv[1]))
