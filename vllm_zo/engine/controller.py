"""The training side of the scheduler: a loop over lanes that collects commands for the workers. No vLLM here.

One engine step, in the order in which the scheduler calls it:

    offer(capacity, ...)       lanes open groups and probe waves where there is room; returns members that may start
    score / generated          note what became of the members
    take_commands()            returns what rides on the SchedulerOutput: materialise, score, close
    on_results(results)        takes in losses and applied coefficients: metrics, seed log, next phase

A group's way: `Lane.open` -> its members through `offer`, `score` -> `Lane.close` -> `on_results`.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from vllm_zo.commands import (
    PROBE_SCHEME,
    Alone,
    Command,
    Fold,
    ForgetVersions,
    Publish,
    StopJob,
    Unpublish,
    ZOCommands,
    ZOResults,
)
from vllm_zo.engine.admission import Capacity
from vllm_zo.engine.group import Member, PerturbationGroup
from vllm_zo.engine.job import Job
from vllm_zo.engine.job_queue import JobQueue
from vllm_zo.engine.lane import Lane, by_need, start
from vllm_zo.engine.rewarder import Cells
from vllm_zo.engine.rollouts import Answer
from vllm_zo.errors import ConfigError, RewardError, ZOError
from vllm_zo.jobs.status import JobStatus
from vllm_zo.methods.plan import ModuleShape

logger = logging.getLogger("vllm.zo")


@dataclass(frozen=True)
class ForwardSoFar:
    """A forward in which the workers run members alone, as far as it has come.

    What layers cost is counted in training tokens, rounded up: all of them cost the tokens of the members, and each the
    share that its rows are of the rows of all.

    Attributes:
        tokens: of its members.
        rows: of each layer after which it may stop (`ZOResults.layer_rows`).
        reached: how many of them it has run.
    """

    tokens: int
    rows: tuple[int, ...]
    reached: int = 0

    def cost(self, layers: int) -> int:
        """What the next `layers` layers cost."""
        return -(-self.tokens * sum(self.rows[self.reached : self.reached + layers]) // sum(self.rows))

    @property
    def left(self) -> int:
        """What all layers cost that it has not run."""
        return self.cost(len(self.rows))

    @property
    def next(self) -> int:
        """What it costs to go on: the layers without rows that come next, and one more."""
        return self.cost(self.within(0) + 1)

    def within(self, tokens: int) -> int:
        """How many of the next layers cost at most so much together."""
        layers = range(len(self.rows) - self.reached)
        return next((number for number in layers if self.cost(number + 1) > tokens), len(layers))


class Controller:
    """Moves the lanes' groups on and collects commands. It needs no lock: only the engine's step loop calls it.

    Args:
        versions_in_use: the versions, <job_id>/<step>, that unfinished requests name.
    """

    def __init__(
        self,
        slots_per_job: int,
        block_size: int,
        concurrent_jobs: int = 1,
        versions_in_use: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.queue = JobQueue(concurrent_jobs, slots_per_job, block_size)
        self._in_flight: dict[str, tuple[Job, PerturbationGroup]] = {}
        """Group id -> (job, group), for closed groups whose results are not back yet."""
        self._commands = ZOCommands()
        self._versions_in_use = versions_in_use
        self._unpublishing: list[Unpublish | ForgetVersions] = []
        """What the workers are told once no request names its versions any more: a worker that has to load one which it
        does not know ends, and its engine with it. New requests for them are refused already."""
        self._numbers = itertools.count(1)
        self.layers_alone = 0
        """See `ZOResults`: the workers tell with the modules of a job."""
        self.layer_rows: tuple[int, ...] = (1,)
        """Of the latest forward of members alone (`ZOResults`). Of the next one only how they compare is expected to be
        the same; before the first one all layers count alike."""
        self.forward = ForwardSoFar(0, self.layer_rows)
        """The latest forward of members alone."""
        self.stopped = False
        """Whether it has stopped between layers. Then nothing else starts before it has ended."""
        self.folds_since_reset = False
        """Whether a fold has made cached KV of the base stale. The scheduler resets the cache, then this flag."""

    # --- jobs -----------------------------------------------------------------------------------------------------

    def add_job(self, job: Job, *, paused: bool = False) -> None:
        """Queue a job, or let it rest from the beginning. Raises ConfigError: its id is in use."""
        self.queue.add(job)
        # A job that goes on has found on disk, and serves again, what it was about to lose.
        self._unpublishing = [command for command in self._unpublishing if command.job_id != job.job_id]
        if paused:
            self.queue.pause(job.job_id)

    def drop(self, job_id: str) -> None:
        """Forget a job that has ended, and its versions. Raises ConfigError: see `JobQueue.drop`."""
        self.queue.drop(job_id)
        self._tell([ForgetVersions(job_id)])

    def has_work(self, *, may_begin: bool = True) -> bool:
        """Whether the engine loop must keep stepping for training.

        Args:
            may_begin: jobs may begin groups. If not, those that are open are still finished.
        """
        if self._commands or self.stopped or self._unpublishing:
            return True
        if may_begin:
            return self.queue.has_work()
        return any(lane.group is not None for lane in self.queue.lanes)

    def waits(self, tokens: int) -> bool:
        """Whether training can only wait: for rewards or rollouts, for space on a full disk, or until members may
        start.

        Args:
            tokens: what an engine step without requests may hold.
        """
        busy = self._commands or self._unpublishing or self._in_flight or self.stopped
        return not busy and self.queue.waits(tokens)

    def finish_early(self, job_id: str, *, cancel: bool) -> None:
        """Stop a job at the next group boundary: evaluate and publish first, or (cancel) drop what has not run yet.

        Raises:
            ConfigError: the job is unknown.
        """
        job = self.queue.get(job_id)
        if job.status.ended:
            return
        if cancel:
            self._end(job, JobStatus.CANCELLED)
        else:
            job.finish_early()

    def request_restore(self, job_id: str) -> None:
        """Ask the workers to bring the original base weights back (after a `fold` job).

        Raises:
            ConfigError: a `fold` job has the engine to itself.
        """
        if (job := self.queue.exclusive) is not None:
            raise ConfigError(f"job {job.job_id} is {job.status} and writes the base: wait for it or cancel it first.")
        # At once: workers execute commands in order, so a job that enters now finds the base restored.
        self.queue.folded_by = None
        self._tell([StopJob(job_id, restore_base=True)])
        self.folds_since_reset = True

    def _tell(self, commands: Sequence[Command], *, after_forward: bool = False) -> None:
        """Send commands with this step. The workers execute them before its forward, or after it."""
        self._unpublishing += [c for c in commands if isinstance(c, Unpublish | ForgetVersions)]
        commands = [c for c in commands if not isinstance(c, Unpublish | ForgetVersions)]
        (self._commands.after if after_forward else self._commands.before).extend(commands)
        if (fold := next((c for c in commands if isinstance(c, Fold)), None)) is not None:
            self.folds_since_reset = True
            self.queue.folded_by = fold.job_id

    # --- scheduling -----------------------------------------------------------------------------------------------

    def offer(
        self, capacity: Capacity, *, in_chunks_beyond: int, serving: bool, may_begin: bool = True
    ) -> list[Member]:
        """Members to hand to vLLM's scheduler for this step, pairs together, one probe after another.

        The lane that has had the fewest tokens chooses first; the next one takes from what is left.

        Args:
            in_chunks_beyond: see `admission.admit`.
            serving: the engine has unfinished requests.
            may_begin: see `has_work`.
        """
        self._close_rewarded()  # first: a lane whose group closes can open the next one in this step
        if may_begin:
            for job in self.queue.entering(serving=serving):
                self._begin(job)
        lanes = [lane for lane in by_need(self.queue.lanes) if may_begin or lane.group is not None]
        for lane in lanes:
            self._tell(lane.open(self._numbers))
            if lane.job is not None and lane.group is None and lane.job.is_complete():
                self._end(lane.job, JobStatus.SUCCEEDED)
        return start(lanes, capacity, in_chunks_beyond)

    @property
    def largest_unit(self) -> int:
        """Tokens of the largest unit that waited when lanes were last asked."""
        return max(lane.largest for lane in self.queue.lanes)

    @property
    def smallest_unit(self) -> int:
        """Tokens of the smallest unit that waited when lanes were last asked; 0 if they never were."""
        return min((lane.smallest for lane in self.queue.lanes if lane.smallest), default=0)

    def _begin(self, job: Job) -> None:
        """Start a job in its lane. The first time it reads its files; if it cannot, the job ends, not the engine."""
        try:
            commands = job.enter()
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            self._finish(job, JobStatus.FAILED, f"{type(error).__name__}: {error}")
            return
        self._tell(commands)
        if commands and job.space == "fold" and job.first_step:
            self.queue.folded_by = job.job_id  # its start folds again what its log says was folded

    def score(self, member: Member, num_computed_tokens: int, num_tokens: int, *, last_chunk: bool) -> None:
        """Note that a member has `num_tokens` tokens in this step."""
        command = self._lane_of(member).score(member, num_computed_tokens, num_tokens, last_chunk=last_chunk)
        if command is None:
            self._commands.generates = True
        else:
            self._commands.members.append(command)

    @property
    def can_run_alone(self) -> bool:
        """Whether the workers can run all members that may be offered. Members that generate need vLLM's requests."""
        return self.layers_alone > 0 and not any(lane.writes for lane in self.queue.lanes)

    def run_alone(self, members: Sequence[Member]) -> None:
        """Let the workers run whole members in a forward of their own: `run_layers` says how far in this step.

        Groups close with their last members, as if the forward could not stop. For what it leaves to later steps the
        workers keep the order, so nothing has to be taken back.
        """
        for member in members:
            self.score(member, 0, len(member.token_ids), last_chunk=True)
        self.forward = ForwardSoFar(sum(len(member.token_ids) for member in members), self.layer_rows)

    def run_layers(self, alone: Alone) -> None:
        """Let the workers begin the forward of `run_alone`, or go on with the one that has stopped."""
        if self._commands.members or alone.layers != 0:
            self._commands.alone = alone

    def generated(self, member: Member, token_ids: Sequence[int], *, finished: bool) -> None:
        """Note that a member of an open group has written `token_ids`."""
        self._lane_of(member).generated(member, token_ids, finished=finished)

    def _lane_of(self, member: Member) -> Lane:
        return next(lane for lane in self.queue.lanes if lane.group is member.group)

    def _close_rewarded(self) -> None:
        """Close groups whose rewards are there. A reward that fails, or takes too long, fails its job."""
        for lane in self.queue.lanes:
            try:
                cells = lane.rewards()
            except RewardError as error:
                assert lane.job is not None
                self._end(lane.job, JobStatus.FAILED, str(error))
                continue
            # Before the forward, which may hold members of the job's next group: they need the updated state.
            if cells is not None:
                self._close(lane, cells)

    # --- rollouts -------------------------------------------------------------------------------------------------

    def exchange_rollouts(self, job_id: str, answers: Sequence[Answer]) -> dict[str, Any]:
        """Take in what has become of a job's rollouts, and hand out those that no front end has got yet.

        Answers for any group but the open one are ignored: its step was taken already, or is taken again.

        Returns:
            {"group": id of the job's open group of rollouts or None, "rollouts": [`PerturbationGroup.hand_out`, ...]}

        Raises:
            ConfigError: the job is unknown.
        """
        lane = self.queue.lane_of(self.queue.get(job_id))
        group = None if lane is None else lane.group
        if group is None or group.rollouts is None:
            return {"group": None, "rollouts": []}
        for answer in answers:
            if answer.group_id == group.group_id:
                group.played(answer)
        return {"group": group.group_id, "rollouts": group.hand_out()}

    def find_probe(self, path: str) -> tuple[PerturbationGroup, int]:
        """The open group and the slot of the probe that the `lora_path` of a request names.

        Raises:
            ConfigError: its group has closed.
        """
        group_id, _, probe = path.removeprefix(PROBE_SCHEME).rpartition("/")
        groups = [lane.group for lane in self.queue.lanes if lane.group is not None]
        group = next((group for group in groups if group.group_id == group_id), None)
        slot = None if group is None else group.slot_of(int(probe))
        if group is None or slot is None:
            raise ConfigError(f"probe {probe} of group {group_id} answers no more: its group has closed.")
        return group, slot

    def wait_idle(self, seconds: float) -> None:
        """Wait while the engine has nothing to do: for the thread of a group's rewards, for rollouts, for space on a
        full disk, or until members may start."""
        rollouts = [lane.group.rollouts for lane in self.queue.lanes if lane.group is not None and lane.group.rollouts]
        started = time.monotonic()
        self._wait_idle(seconds)
        for of_group in rollouts:
            of_group.cost.idle_s += time.monotonic() - started

    def _wait_idle(self, seconds: float) -> None:
        scorings = [lane.group.scoring for lane in self.queue.lanes if lane.group is not None and lane.group.scoring]
        # One thread is enough: the engine steps again after `seconds` and looks at all of them.
        if scorings:
            scorings[0].wait(seconds)
        elif any(lane.held_up for lane in self.queue.lanes):
            time.sleep(seconds)

    def take_commands(self) -> ZOCommands:
        """Close groups whose last member is scheduled, and hand over everything collected for this step."""
        for lane in self.queue.lanes:
            if lane.scored:
                self._close(lane, after_forward=True)
        self._commands.after.extend(self._take_unpublishing())
        commands, self._commands = self._commands, ZOCommands()
        if any(isinstance(command, Publish) for command in commands.after):
            commands.alone = commands.alone and Alone()  # a request for the version may be in the next step
        if commands:
            self.stopped = False  # unless the results say otherwise
        return commands

    def _take_unpublishing(self) -> list[Command]:
        if not self._unpublishing or self.stopped:  # they would let a forward that has stopped run to its end
            return []
        versions = set(self._versions_in_use())
        jobs = {name.rpartition("/")[0] for name in versions}

        def waits(command: Unpublish | ForgetVersions) -> bool:
            if isinstance(command, ForgetVersions):
                return command.job_id in jobs
            return f"{command.job_id}/{command.version}" in versions

        due: list[Command] = []
        waiting: list[Unpublish | ForgetVersions] = []
        for command in self._unpublishing:
            (waiting if waits(command) else due).append(command)
        self._unpublishing = waiting
        return due

    def _close(self, lane: Lane, cells: Cells | None = None, *, after_forward: bool = False) -> None:
        assert lane.job is not None
        group, commands = lane.close(cells)
        self._in_flight[group.group_id] = lane.job, group
        self._tell(commands, after_forward=after_forward)

    def drop_groups(self) -> None:
        """Cancel the open groups after vLLM aborted their members (pause, shutdown). Their work runs again later."""
        for lane in self.queue.lanes:
            self._drop_group(lane)

    def _drop_group(self, lane: Lane) -> None:
        self._tell(lane.drop())
        if lane.job is not None:
            self.queue.rest(lane.job)

    # --- results --------------------------------------------------------------------------------------------------

    def on_results(self, results: ZOResults) -> None:
        """Take in what the workers answered in one engine step, and end the jobs that must end."""
        if results.layer_rows:
            self.layer_rows = results.layer_rows
            self.forward = replace(self.forward, rows=self.layer_rows)
        if results.stopped_at is not None:
            self.stopped, self.forward = True, replace(self.forward, reached=results.stopped_at)
        for job_id, modules in results.modules.items():
            if results.layers_alone != self.layers_alone:
                self.layers_alone, self.layer_rows = results.layers_alone, (1,) * max(results.layers_alone, 1)
            if (job := self.queue.jobs.get(job_id)) is not None:  # cancelled and dropped while it was set up
                self._open_log(job, modules)
        for result in results.groups:  # before failures: the update of a group that answered is in the state
            if (closed := self._in_flight.pop(result.group_id, None)) is None:
                continue  # its job has failed meanwhile
            job, group = closed
            cost = None if group.rollouts is None else group.rollouts.cost
            job.on_result(group.work, result, group.opened_at, group.cells, cost)
            self._tell(job.take_commands())
            if (verdict := job.verdict()) is not None:
                self._end(job, *verdict)
            else:
                self.queue.rest(job)
        for refused in results.unpublished:
            if (publisher := self.queue.jobs.get(refused.job_id)) is not None:
                publisher.versions.drop(refused.version)
        for digest in results.digests:
            if (asked := self.queue.jobs.get(digest.job_id)) is not None:
                asked.on_digest(digest.steps, digest.digest)
        for drift in results.drifts:
            drifting = self.queue.jobs.get(drift.job_id)
            if drifting is not None and not drifting.status.ended and drifting.on_drift(drift.norm):
                self.queue.pause(drift.job_id)
        for failure in results.failures:
            failed = self.queue.jobs.get(failure.job_id)
            if failed is not None and not failed.status.ended:
                failed.versions.drop_unwritten()
                self._finish(failed, JobStatus.FAILED, failure.message)

    def _open_log(self, job: Job, modules: Sequence[ModuleShape]) -> None:
        if job.status.ended:  # cancelled while the workers were setting it up
            return
        try:
            job.open_log(modules)
        except ZOError as error:  # another job's log, a full disk: this job ends, the engine does not
            self._finish(job, JobStatus.FAILED, str(error))

    def _end(self, job: Job, status: JobStatus, error: str | None = None) -> None:
        """End a job, once the results of its groups in flight are in."""
        if (lane := self.queue.lane_of(job)) is not None:
            self._drop_group(lane)
        if job.may_end((status, error)):
            self._finish(job, status, error)

    def _finish(self, job: Job, status: JobStatus, error: str | None = None) -> None:
        """End a job now. `on_results` ignores what its groups in flight still answer."""
        if (lane := self.queue.lane_of(job)) is not None:
            self._drop_group(lane)
        self._in_flight = {key: closed for key, closed in self._in_flight.items() if closed[0] is not job}
        job.end(status, error)
        self._tell(job.at_end())
        self.queue.remove(job)
        job.recorder.summarise(job.summary())
        job.recorder.forget()
        job.forget_examples()
        why = job.summary()["error"]
        log = logger.error if job.status == JobStatus.FAILED else logger.info
        log("job %s %s at step %d%s", job.job_id, job.status, job.recorded, f": {why}" if why else "")
