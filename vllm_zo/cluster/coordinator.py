"""Runs one job on many engines. It is to them what a lane is to one: it hands out work and takes in what comes back.

The seed log is the only state there is; engines are caches of it. A step goes like this:

    Job.next_work            the shards of the step, one after another
    Score                    each shard to the engine that has the least in hand
    Scored                   cells; with the last of them the job decides, and its recorder gets the step
    JobRecorder.hand_over    the step is in the log before anybody applies it
    Commit                   the record, to all engines

So an engine that has gone loses nothing: another one scores its shards, and when it is back it reads the log. The
coordinator does no input or output but the job's files. Whoever hosts it calls the methods under "what happens", sends
what `messages` returns, and gives it a clock. It knows neither vLLM nor how messages travel.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_zo.checkpoint.seed_log.header import differences
from vllm_zo.cluster.leases import IN_HAND, Lease, Leases
from vllm_zo.cluster.protocol import (
    Commit,
    Digested,
    FromEngine,
    Join,
    Joined,
    Score,
    Scored,
    Stop,
    Stopped,
    ToEngine,
)
from vllm_zo.commands import Command, GroupCells, GroupResult, Publish, ReportDigest, StopJob
from vllm_zo.engine.job import Ending, Job
from vllm_zo.errors import ZOError
from vllm_zo.jobs.status import JobStatus

logger = logging.getLogger("vllm.zo.cluster")

DIGEST_INTERVAL = 100
"""Steps after which engines report digests of their states. They also do after each version that is published."""


@dataclass
class Engine:
    """What the coordinator knows of an engine.

    Attributes:
        ready: it has the state, and may be given work.
        shards: works whose answer came from it first.
        tokens: of these works, every probe counted.
        seconds: between giving it a work and the answer, for the latest one.
    """

    ready: bool = False
    shards: int = 0
    tokens: int = 0
    seconds: float | None = None
    joined_at: float = field(default=0.0)


class Coordinator:
    """Owns a job and hands its work to engines.

    Args:
        job: takes the log path (`JobConfig.shards`). It is made for this coordinator, and has not begun.
        epoch: higher than that of any coordinator that the job had before.
        clock: seconds; monotonic.
        min_engines: with fewer that are ready, the job waits.
    """

    def __init__(
        self, job: Job, epoch: int = 0, clock: Callable[[], float] = time.monotonic, min_engines: int = 1
    ) -> None:
        assert job.config.shards is not None or job.evaluate_only
        self.job, self.epoch = job, epoch
        self.engines: dict[str, Engine] = {}
        self._known: dict[str, Engine] = {}
        """The engines that are here, and those that have left, as they were in their latest life."""
        self._clock, self._min_engines = clock, min_engines
        self._leases = Leases()
        self._digest: Digested | None = None
        """The first of the newest that engines have reported, of which all must be equal."""
        self._digest_of = ""
        """The engine that has reported it."""
        self._joining_again: set[str] = set()
        """Engines that have been told to forget the job because their state differs, and then join again."""
        self._differed: set[str] = set()
        """Engines that were told so in the life of this coordinator: a second time is no accident."""
        self._step_since: float | None = None
        """When the first shard of the step under way was opened."""
        self._arrived: list[str] = []
        """Engines that have not been told of the job."""
        self._outbox: list[tuple[str, ToEngine]] = []
        self._commits: list[Command] = []
        """Commands for all engines that wait until the log has what they say."""
        self._agreed: Joined | None = None
        """What the first engine said of itself: the others must say the same."""
        self.dismissed = False
        """Whether all engines have been told to forget the job."""
        job.enter()

    # --- what happens -------------------------------------------------------------------------------------------------

    def arrive(self, name: str) -> None:
        """An engine is here. It knows nothing of the job: it is new, or was started again."""
        assert name not in self.engines
        if not self.dismissed:
            self.engines[name] = self._known[name] = Engine(joined_at=self._clock())
            self._arrived.append(name)

    def leave(self, name: str) -> None:
        """An engine has gone. Others take its work."""
        if (engine := self.engines.pop(name, None)) is not None:
            engine.ready = engine.ready and self.job.status.ended
            self._arrived = [other for other in self._arrived if other != name]
            self._leases.leave(name)
            self._outbox = [(to, message) for to, message in self._outbox if to != name]

    def receive(self, name: str, message: FromEngine) -> None:
        """Take in the answer of an engine. Answers of an engine that has left, or to another coordinator, are ignored.

        The job ends with the first error of an engine: the others would make the same one.
        """
        if message.epoch > self.epoch:
            self.fail(
                f"{name} answers coordinator {message.epoch} of this job, and this one is {self.epoch}: another has "
                "taken the job over; let only one of them run."
            )
        if message.epoch != self.epoch or (engine := self.engines.get(name)) is None:
            return
        if isinstance(message, Joined):
            self._on_joined(name, engine, message)
        elif isinstance(message, Scored):
            self._on_scored(name, engine, message)
        elif isinstance(message, Digested):
            self._on_digested(name, engine, message)
        else:
            self._on_stopped(name, message)

    def stop(self, *, cancel: bool) -> None:
        """Cancel the job, or let it take no further step, evaluate and succeed."""
        if self.job.status.ended:
            return
        if cancel:
            self._end((JobStatus.CANCELLED, None))
        else:
            self.job.finish_early()

    def fail(self, why: str) -> None:
        """End the job with an error, unless it has ended."""
        if not self.job.status.ended:
            self._end((JobStatus.FAILED, why))

    def _on_joined(self, name: str, engine: Engine, joined: Joined) -> None:
        if self.dismissed:
            return
        if self._agreed is None:
            try:
                if self.job.recorder.waiting:  # else it rested in between
                    self.job.open_log(joined.modules)
            except ZOError as error:  # the log is another job's, or in use; a full disk
                self.fail(str(error))
                return
            self._agreed = joined
        elif (why := _difference(self._agreed, joined)) is not None:
            self.fail(f"{name} differs from the first engine: {why}; start all engines alike")
            return
        engine.ready = True
        logger.info("%s has joined job %s at step %d", name, self.job.job_id, self.job.recorded)

    def _on_scored(self, name: str, engine: Engine, scored: Scored) -> None:
        now = self._clock()
        if (lease := self._leases.answered(scored.number, name, now)) is None:
            return  # another engine was first
        work = lease.work
        engine.shards += 1
        engine.tokens += sum(example.num_tokens for example in work.examples) * len(work.plan.probes)
        engine.seconds = now - lease.holders.get(name, lease.opened_at)
        result: GroupResult | GroupCells = GroupCells(str(scored.number), [list(of_probe) for of_probe in scored.cells])
        if not work.reports_cells:
            result = self._evaluated(lease, scored)
        rewards = _rewards(scored) if work.sampling_seeds else None
        self.job.on_result(work, result, lease.opened_at, rewards, scored.cost)
        self._take_decisions()

    def _take_decisions(self) -> None:
        if commands := self.job.take_commands():
            self._step_since = None
            self._commits += self._with_digest(commands)
        if (ending := self.job.verdict()) is not None:
            self._end(ending)

    def _with_digest(self, commands: list[Command]) -> list[Command]:
        """The commands, and a question for the digest of the state that they leave, where it is time for one."""
        steps = self.job.recorded
        if commands and (steps % DIGEST_INTERVAL == 0 or any(isinstance(command, Publish) for command in commands)):
            return [*commands, ReportDigest(self.job.job_id, steps)]
        return commands

    def _on_digested(self, name: str, engine: Engine, digested: Digested) -> None:
        """Put an engine out whose state is not that of the first one; it joins again, from the log."""
        if self.dismissed or name in self._joining_again:
            return
        if self._digest is None or self._digest.steps < digested.steps:
            self._digest, self._digest_of = digested, name
        if self._digest.steps != digested.steps or self._digest.digest == digested.digest:
            return
        why = (
            f"after step {digested.steps} the state of {name} has digest {digested.digest:016x}, and that of "
            f"{self._digest_of} {self._digest.digest:016x}"
        )
        if name in self._differed:
            self.fail(f"{why}, again: engines of one job must be alike; start them on devices of one kind")
            return
        logger.error("%s; it joins again, from the log", why)
        self._differed.add(name)
        self._joining_again.add(name)
        engine.ready = False
        self._leases.leave(name)
        self._outbox = [(to, message) for to, message in self._outbox if to != name] + [(name, Stop(self.epoch))]

    def _evaluated(self, lease: Lease, scored: Scored) -> GroupResult:
        losses, predictions = self.job.config.objective.loss(torch.tensor(scored.cells), lease.work.examples)
        finite = bool(torch.isfinite(losses).all())
        return GroupResult(str(scored.number), losses.tolist(), predictions.tolist(), [], finite)

    def _on_stopped(self, name: str, stopped: Stopped) -> None:
        self.leave(name)
        if name in self._joining_again and stopped.error is None:
            self._joining_again.discard(name)
            self.arrive(name)
        elif not self.dismissed:
            self.fail(f"{name}: {stopped.error or 'the engine has dropped the job'}")

    # --- what to send -------------------------------------------------------------------------------------------------

    def messages(self) -> list[tuple[str, ToEngine]]:
        """What to send now, as (engine, message), in this order."""
        if not self.dismissed:
            if self.job.status == JobStatus.PAUSED:
                self._rest()
            elif self.job.is_complete():
                self._end((JobStatus.SUCCEEDED, None))
            else:
                self._mind_deadline()
            if not self.dismissed:
                self._send_commits()
                self._hand_out()
        sent, self._outbox = self._outbox, []
        return sent

    def wakes_at(self) -> float | None:
        """When to ask for `messages` again though nothing has happened; None: only when something has."""
        late, due = self._leases.next_late(self._clock()), self._due
        return late if due is None else due if late is None else min(late, due)

    @property
    def _due(self) -> float | None:
        """When the step under way may go on without late directions; None: it waits for all."""
        deadline, since = self.job.config.deadline, self._step_since
        return None if deadline is None or since is None else since + deadline

    def _mind_deadline(self) -> None:
        due = self._due
        if due is None or self._clock() < due:
            return
        self._step_since = None  # if it may not drop any now, it waits for all
        if self.job.drop_late():
            self._leases.drop_step()
            self._take_decisions()

    @property
    def ended(self) -> bool:
        """Whether the job has ended or come to rest, and every engine that is here has forgotten it.

        A job that has come to rest goes on with another coordinator.
        """
        return self.dismissed and not self.engines and not self._outbox

    def _send_commits(self) -> None:
        """Send what is in the log. If the disk is full, nothing: the job waits until there is space."""
        if not (self._commits or self._arrived) or not self.job.recorder.hand_over():
            return
        self._broadcast()
        # After the commits: an engine that joins now reads from the log what they say.
        joining, self._arrived = self._arrived, []
        for name in joining:
            self._outbox.append((name, Join(self.epoch, str(self.job.directory.path), self.job.recorded)))
            if newest := self.job.versions.publish_again(self.job.recorded):
                self._outbox.append((name, Commit(self.epoch, tuple(newest))))

    def _broadcast(self) -> None:
        commits, self._commits = tuple(self._commits), []
        if commits:
            message = Commit(self.epoch, commits)
            away = {*self._arrived, *self._joining_again}
            self._outbox += [(name, message) for name in self.engines if name not in away]

    def _hand_out(self) -> None:
        """Give works to engines that have room: those that came back first, then new ones, then late ones again."""
        if self._commits:
            return  # what comes next is scored in the state that they make
        if self._waits_for_engines():
            return
        now = self._clock()
        self._leases.take_back_lost(now)
        if (lease := self._next_lease(now)) is None:
            self._hand_out_late(now)
            return
        for in_hand in range(IN_HAND):  # first those who have nothing, then those who have one
            for name, engine in self.engines.items():
                if engine.ready and self._leases.in_hand(name) <= in_hand:
                    self._give(lease, name, now)
                    if (lease := self._next_lease(now)) is None:
                        return
        self._leases.give_back(lease)

    def _hand_out_late(self, now: float) -> None:
        """Give late works to idle engines, too: nothing else is left to give."""
        for lease in self._leases.late(now):
            idle = (n for n, engine in self.engines.items() if engine.ready and not self._leases.in_hand(n))
            if (name := next(idle, None)) is None:
                return
            self._give(lease, name, now)

    def _next_lease(self, now: float) -> Lease | None:
        if (lease := self._leases.returned()) is not None:
            return lease
        if (work := self.job.next_work()) is None:
            return None
        if work.trains and self._step_since is None:
            self._step_since = now
        # A fold comes before the first shard in a new basis; what is published after an evaluation is what it measured.
        self._commits += self.job.before(work)
        self._broadcast()
        self._commits += self._with_digest(self.job.after(work))
        return self._leases.open(work, now)

    def _give(self, lease: Lease, name: str, now: float) -> None:
        self._leases.give(lease, name, now)
        self._outbox.append((name, Score.of(self.epoch, lease.number, lease.work)))
        self._broadcast()

    def _end(self, ending: Ending) -> None:
        job = self.job
        job.end(*ending)
        # Commands of steps that are in the log; `end` has written them.
        self._commits += [command for command in job.at_end() if not isinstance(command, StopJob)]
        self._dismiss()
        job.recorder.summarise(job.summary())
        job.recorder.forget()
        job.forget_examples()

    def _rest(self) -> None:
        """Let the engines forget a job that was paused: its state is in its log. Nothing of it is under way."""
        if self.job.recorder.hand_over():
            self._dismiss()

    def _dismiss(self) -> None:
        self.dismissed = True
        self._leases.clear()
        self._broadcast()
        for name in self._arrived:
            del self.engines[name]
        self._arrived = []
        self._outbox += [(name, Stop(self.epoch)) for name in self.engines if name not in self._joining_again]

    # --- for people ---------------------------------------------------------------------------------------------------

    def status(self, since: int = 0) -> dict[str, Any]:
        """What `zo_status` of an engine answers, and every engine's part."""
        records, total = self.job.recorder.records(since)
        status = {**self.job.summary(), "records": records, "next": total, "engines": self.stats()}
        if not self.dismissed and status["waits_for"] is None:
            status["waits_for"] = self._waits_for_engines()
        return status

    def _waits_for_engines(self) -> str | None:
        """Why no work is handed out, if too few engines are ready."""
        ready = sum(engine.ready for engine in self.engines.values())
        if ready >= self._min_engines or self._min_engines == 1:
            return None  # one that is awaited comes, or the host ends the job
        return f"min_engines={self._min_engines}: {ready} are ready"

    def stats(self) -> dict[str, dict[str, Any]]:
        """Engine -> whether it is ready (when the job has ended: was to the end), what it has scored and has in hand,
        tokens a second, seconds of its latest work."""
        now = self._clock()
        return {
            name: {
                "ready": engine.ready,
                "shards": engine.shards,
                "in_hand": self._leases.in_hand(name),
                "tokens_per_s": engine.tokens / max(now - engine.joined_at, 1e-9),
                "latest_s": engine.seconds,
            }
            for name, engine in self._known.items()
        }


def _difference(first: Joined, other: Joined) -> str | None:
    if first.software != other.software:
        return f"{other.software} (the first has {first.software})"
    if first.modules != other.modules:
        return f"{len(other.modules)} target modules that are not its {len(first.modules)}"
    here, there = ({} if of.header is None else json.loads(of.header.to_json()) for of in (other, first))
    return "; ".join(differences(here, there, "the first has")) or None


def _rewards(scored: Scored) -> tuple[tuple[float, ...], ...]:
    """(probes, sequences): where members write, a cell is the reward of one sequence."""
    return tuple(tuple(of_probe) for of_probe in scored.cells)
