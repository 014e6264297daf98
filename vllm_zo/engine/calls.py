"""What a front end may ask of the scheduler, by the names of `UTILITY_METHODS`: vLLM's EngineCore utility calls."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from vllm_zo.engine.job import Job
from vllm_zo.engine.load_job import load_job
from vllm_zo.engine.rollouts import Answer
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.status import JobStatus


class Seats(Protocol):
    """Carries messages between coordinators and their jobs here; what they say is no business of the scheduler's."""

    def tell(self, messages: bytes) -> None: ...

    def hear(self) -> Future[bytes]: ...


class Calls:
    """Answers between two steps of the engine: its loop is the only caller.

    Args:
        scheduler: a `ZOSchedulerMixin`.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.seats: Seats | None = None
        """Where coordinators of the front end have their jobs; None where every job is this engine's own."""

    def zo_start(self, job_dir: str, paused: bool = False) -> dict[str, Any]:
        """Queue the job that the front end wrote to `job_dir`; returns its summary.

        Args:
            paused: the job rests until it is resumed.

        Raises:
            ConfigError: the job cannot run on this engine (`load_job`), or its id is in use.
            CorruptLogError: the header of its seed log cannot be read.
        """
        directory = JobDir(Path(job_dir))
        job: Job = load_job(directory, self._scheduler.zo_facts, self._scheduler.zo_read)
        self._scheduler.zo.add_job(job, paused=paused)
        return job.summary()

    def zo_status(self, job_id: str, since: int = 0) -> dict[str, Any]:
        """Summary and metric records from number `since` on. Raises ConfigError: the job is unknown."""
        status = self._scheduler.zo.queue.status(job_id, since)
        if status["status"] == JobStatus.RUNNING and status["waits_for"] is None:
            status["waits_for"] = self._scheduler.zo_throttle.closed
        return status

    def zo_stop(self, job_id: str, cancel: bool) -> None:
        """Cancel a job, or let it finish early. Raises ConfigError: the job is unknown."""
        self._scheduler.zo.finish_early(job_id, cancel=cancel)

    def zo_pause(self, job_id: str) -> str:
        """Pause a job; returns its status, which is "paused" at once if none of its groups was open or in flight.

        Raises:
            ConfigError: see `JobQueue.pause`.
        """
        self._scheduler.zo.queue.pause(job_id)
        return self._scheduler.zo.queue.get(job_id).status.value

    def zo_resume(self, job_id: str) -> None:
        """Let a paused job go on. Raises ConfigError: the job is unknown or not paused."""
        self._scheduler.zo.queue.resume(job_id)

    def zo_extend(self, job_id: str, size: int) -> None:
        """Let a continual job draw from appended rows: the disk has `size` bytes of them (`jobs/appended.py`).

        Raises:
            ConfigError: the job is unknown, has ended, or is none whose rows may grow.
        """
        self._scheduler.zo.queue.growing(job_id).extend(size)

    def zo_forget(self, job_id: str, key: str) -> None:
        """Draw no row any more that the call `key` has appended. Raises ConfigError as `zo_extend`."""
        self._scheduler.zo.queue.growing(job_id).delete(key)

    def zo_drop(self, job_id: str) -> None:
        """Forget a job that has ended, and its versions; its files stay. For a front end that outlives many jobs.

        Raises:
            ConfigError: the job is unknown, has not ended, or its weights are in the base.
        """
        self._scheduler.zo.drop(job_id)

    def zo_rollouts(self, job_id: str, answers: Sequence[Sequence[Any]] = ()) -> dict[str, Any]:
        """Take in answers of rollouts (the fields of `Answer`), and hand out the next ones.

        Raises:
            ConfigError: the job is unknown.
        """
        return self._scheduler.zo.exchange_rollouts(job_id, [Answer(*answer) for answer in answers])

    def zo_tell(self, messages: bytes) -> None:
        """Take messages of coordinators. Raises ConfigError: this engine has no seats for them."""
        self._seats().tell(messages)

    def zo_hear(self) -> Future[bytes]:
        """What the engine has to say to coordinators, as soon as there is something; to be asked again after that.

        Raises:
            ConfigError: this engine has no seats for them.
        """
        return self._seats().hear()

    def _seats(self) -> Seats:
        if self.seats is None:
            raise ConfigError(
                "this engine takes no part in jobs of a coordinator: `vllm-zo serve` starts one that does."
            )
        return self.seats

    def zo_stats(self) -> dict[str, Any]:
        """The figures of `JobQueue.stats`, the tokens scheduled since the engine started, and `Throttle.stats`."""
        return {
            **self._scheduler.zo.queue.stats(),
            "tokens": dict(self._scheduler.zo_tokens),
            "pace": self._scheduler.zo_throttle.stats(),
        }

    def zo_restore_base(self, job_id: str) -> None:
        """Bring back the base weights as they were before the `fold` job.

        Raises:
            ConfigError: requests are unfinished, or a `fold` job writes the base.
        """
        if self._scheduler.zo.queue.exclusive is None and self._scheduler.get_num_unfinished_requests():
            raise ConfigError(
                "restore_base changes the weights under unfinished requests: wait for them, or abort them."
            )
        self._scheduler.zo.request_restore(job_id)
