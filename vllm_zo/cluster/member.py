"""A coordinator's job as one of its engines holds it. A shard is a group like any other; what to score comes from
outside, and what was scored goes back there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from vllm_zo.cluster.protocol import Commit, Digested, FromEngine, Joined, Score, Scored, Stopped
from vllm_zo.commands import ApplyRecord, Command, GroupCells, GroupResult, Publish, StopJob, Unpublish
from vllm_zo.engine.group import Work
from vllm_zo.engine.job import Ending, Job
from vllm_zo.engine.recorder import JobRecorder
from vllm_zo.engine.references import References
from vllm_zo.engine.rewarder import Cells
from vllm_zo.engine.rollouts import Cost
from vllm_zo.jobs.status import JobStatus
from vllm_zo.methods.plan import ModuleShape


class NoRecorder(JobRecorder):
    """Writes nothing: the files of the job are its coordinator's."""

    def open(self, modules: Sequence[ModuleShape], *, evaluates_again: bool) -> None:
        self.waiting = False

    def summarise(self, summary: dict[str, Any]) -> None:
        pass


class MemberJob(Job):
    """A job that decides nothing: it scores what it is given, and has the workers execute what is committed.

    Commits wait until there is something to score, or the job ends. The workers execute them in the order in which they
    came, so that a shard meets the state that the commits before it have made.

    Attributes:
        epoch: of its coordinator.
        send: takes what goes to the coordinator.
    """

    epoch: int
    send: Callable[[FromEngine], None]
    software: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._inbox: deque[Score | Commit] = deque()
        self._applied = self.first_step
        """Steps that the state has, with the commits that have left the inbox."""

    def take(self, message: Score | Commit) -> None:
        """Take a message of the coordinator. One of an earlier coordinator, and a shard that is here, are ignored."""
        is_here = isinstance(message, Score) and message in self._inbox
        if message.epoch == self.epoch and not is_here:
            self._inbox.append(message)

    @property
    def moves(self) -> bool:
        return bool(self._outstanding or self._inbox or self.recorder.waiting)

    # --- what the engine asks of a job --------------------------------------------------------------------------------

    def open_log(self, modules: Sequence[ModuleShape]) -> None:
        super().open_log(modules)
        self.send(Joined(self.epoch, tuple(modules), self.recorder.header(modules), self.software))

    def next_work(self) -> Work | None:
        if self.recorder.waiting or self._ending is not None:
            return None
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Score):
                return self._issue(self._work(message))
            self._commit(message)
        return None

    def _work(self, score: Score) -> Work:
        if score.plan.of_base:
            data = References.numbered(self.fixed_rows.examples, self._validation)
            examples = tuple(data[index] for index in score.example_ids)
        elif score.trains:
            examples = self.rows.of(score.example_ids)
        else:
            examples = tuple(self._validation[index] for index in score.example_ids)
        # A learning rate says that the group trains. It is not used: the group reports its cells.
        rate = 0.0 if score.trains else None
        return Work(score.plan, score.example_ids, examples, rate, False, score.sampling_seeds, shard=score.number)

    def _commit(self, commit: Commit) -> None:
        for command in commit.commands:
            if isinstance(command, ApplyRecord):
                assert command.record.step == self._applied, "commits arrive in order, and each once"
                self._applied += 1
            elif isinstance(command, Publish):
                self.versions.note(command.version)
            elif isinstance(command, Unpublish):
                self.versions.drop(command.version)
        self._commands += commit.commands

    def before(self, work: Work) -> list[Command]:
        return self.take_commands()

    def take_back(self, work: Work) -> None:
        assert work.shard is not None
        self._outstanding -= 1
        self._inbox.appendleft(Score.of(self.epoch, work.shard, work))

    def on_result(
        self,
        work: Work,
        result: GroupResult | GroupCells,
        opened_at: float,
        cells: Cells | None = None,
        cost: Cost | None = None,
    ) -> None:
        assert isinstance(result, GroupCells) and work.shard is not None
        self._outstanding -= 1
        self.send(Scored(self.epoch, work.shard, result.cells, cost))

    def on_digest(self, steps: int, digest: int) -> None:
        self.send(Digested(self.epoch, steps, digest))

    def verdict(self) -> Ending | None:
        return self._ending

    def is_complete(self) -> bool:
        return False

    def at_end(self) -> list[Command]:
        commits = [message for message in self._inbox if isinstance(message, Commit)]
        self._inbox.clear()
        for commit in commits:
            self._commit(commit)
        return [*self.take_commands(), StopJob(self.job_id)] if self.begun else []

    def end(self, status: JobStatus, error: str | None) -> None:
        super().end(status, error)
        self.send(Stopped(self.epoch, error))
