"""A coordinator's seat in an engine: the job that it has given the engine, whatever carries their messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from vllm_zo.cluster.member import MemberJob, NoRecorder
from vllm_zo.cluster.protocol import FromEngine, Join, Stop, Stopped, ToEngine
from vllm_zo.engine.load_job import EngineFacts, load_job
from vllm_zo.errors import ZOError
from vllm_zo.jobs.directory import JobDir


class TrainingScheduler(Protocol):
    """What a seat needs of the engine's scheduler (`engine/scheduler.py`)."""

    zo: Any
    zo_read: Any

    @property
    def zo_facts(self) -> EngineFacts: ...


class Seat:
    """Takes what a coordinator says, and has the engine do it.

    Args:
        software: names and versions of what computes (`Joined.software`).
        send: takes what goes to the coordinator. `Stopped` comes with the job's last commands, which the workers
            execute in the next engine step.
        prepare: called with each job before the engine gets it. A ZOError or OSError of it is the answer.
    """

    def __init__(
        self,
        scheduler: TrainingScheduler,
        software: str,
        send: Callable[[FromEngine], None],
        prepare: Callable[[MemberJob], None] = lambda job: None,
    ) -> None:
        self._scheduler, self._software, self._send, self._prepare = scheduler, software, send, prepare
        self._job: MemberJob | None = None

    @property
    def taken(self) -> bool:
        """Whether a job of a coordinator has not ended here."""
        return self._job is not None and not self._job.status.ended

    def take(self, message: ToEngine) -> None:
        """Take a message. `Join` needs a seat that is not taken; the others are ignored unless their job is here."""
        if isinstance(message, Join):
            self._join(message)
        elif self._job is None or message.epoch != self._job.epoch:
            return
        elif isinstance(message, Stop):
            self.stop()
        else:
            self._job.take(message)

    def stop(self) -> None:
        """Have the workers execute the commits that are left, and forget the job."""
        if self._job is not None:
            self._scheduler.zo.finish_early(self._job.job_id, cancel=True)

    def _join(self, join: Join) -> None:
        assert not self.taken, "a coordinator waits for `Stopped` before it lets a job join again"
        try:
            job = load_job(
                JobDir(Path(join.job_dir)),
                self._scheduler.zo_facts,
                self._scheduler.zo_read,
                kind=MemberJob,
                recorder=NoRecorder,
                upto=join.steps,
            )
            self._prepare(job)
        except (ZOError, OSError) as error:
            self._job = None
            self._send(Stopped(join.epoch, str(error)))
            return
        job.epoch, job.send, job.software = join.epoch, self._send, self._software
        self._job = job
        self._scheduler.zo.add_job(job)
