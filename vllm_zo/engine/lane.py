"""Lanes: the engine's room for jobs that run together. They decide which job goes next, and move its groups on.

A lane is a fixed share of the ZO slots and at most one open group. Jobs beyond the lanes queue. Lanes share tokens by
fair queueing: the lane that has had the fewest goes first. A job that enters starts level with the lowest lane, because
it has no claim on the time before; from zero it would shut the other jobs out until it had caught up.

A lane moves its job's group on and returns the commands that the workers need for it:

    open        opens the next group, or the next probe wave of the open one
    start       picks the members that may start now
    score       notes that a member has tokens in this step
    generated   notes what a member has written
    close       closes the complete group: the workers update, then publish or save
    drop        cancels the group
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from vllm_zo.commands import CloseGroup, Command, DropGroup, Materialise, OpenGroup, ReportCells, ScoreMember
from vllm_zo.engine.admission import NOTHING, UNLIMITED, Capacity, admit
from vllm_zo.engine.group import Member, PerturbationGroup, Phase, Work
from vllm_zo.engine.job import Job
from vllm_zo.engine.rewarder import Cells
from vllm_zo.engine.rollouts import Rollouts
from vllm_zo.engine.slot_table import SlotTable
from vllm_zo.jobs.status import JobStatus
from vllm_zo.methods.targets import LM_HEAD
from vllm_zo.objectives import Rollout


class Lane:
    """Room for one running job.

    Attributes:
        slots: the lane's share of the ZO slots.
        job: the job that has the lane; None while it is free.
        group: the job's group from its opening until it is closed or dropped.
        tokens: member tokens scheduled, the currency of fair sharing.
        passes: how many units have started before the first of the lane's own that waits (`admission.admit`).
        largest, smallest: tokens of the largest and the smallest unit that waited when the lane was last asked.
    """

    def __init__(self, first_slot: int, num_slots: int, block_size: int) -> None:
        self.slots = SlotTable(range(first_slot, first_slot + num_slots))
        self.job: Job | None = None
        self.group: PerturbationGroup | None = None
        self.tokens = self.passes = self.largest = self.smallest = 0
        self._block_size = block_size

    def leave(self) -> None:
        """Free the lane after its job ended or came to rest. The job has no group, and so no slots, any more."""
        assert self.group is None and len(self.slots.free) == len(self.slots)
        self.job = None
        self.passes = self.largest = self.smallest = 0

    # --- a group's way ------------------------------------------------------------------------------------------------

    def open(self, numbers: Iterator[int]) -> list[Command]:
        """Open the job's next group, or the next probe wave of the open one, where that is possible now.

        Args:
            numbers: counts the engine's groups. Unique group ids keep a late result of a job that has ended apart from
                those of a job that was started again under the same id.
        """
        assert self.job is not None
        commands: list[Command] = []
        if self.group is None:
            if (work := self.job.next_work()) is None:
                return []
            commands += self.job.before(work)  # a fold must precede everything in the new basis
            self.group = self._group_for(work, next(numbers))
            # Only rewards read the columns of an example, and they are computed in this process.
            shown = tuple(e if e.columns is None else replace(e, columns=None) for e in work.examples)
            commands.append(OpenGroup(self.job.job_id, self.group.group_id, work.plan, shown))
        if self.group.phase is Phase.OPEN and self.group.wave_done and not self.group.done:
            placement = self.group.open_wave()
            commands += [
                Materialise(self.job.job_id, self.group.group_id, slot, probe) for probe, slot in placement.items()
            ]
        return commands

    def _group_for(self, work: Work, number: int) -> PerturbationGroup:
        assert self.job is not None
        config, group_id = self.job.config, f"zo-{self.job.job_id}-{number}"
        objective, at_once = config.objective, config.method.coordinates.max_probes_at_once
        rollouts = Rollouts(objective) if isinstance(objective, Rollout) else None
        return PerturbationGroup(
            group_id, self.job.job_id, work, self.slots, self._block_size, at_once, rollouts,
            kv_of_base=config.target_modules == LM_HEAD,
        )  # fmt: skip

    def start(self, capacity: Capacity, in_chunks_beyond: int) -> tuple[list[list[Member]], Capacity]:
        """Units of members that start in this step, and the capacity that they leave to the lanes behind this one.

        Args:
            in_chunks_beyond: see `admission.admit`.
        """
        if self.group is None or self.group.rollouts is not None:
            return [], capacity
        units, members = self.group.units()
        self.largest = max((unit.cost for unit in units), default=self.largest)
        self.smallest = min((unit.tokens for unit in units), default=self.smallest)
        admission = admit(units, capacity, passes=self.passes, in_chunks_beyond=in_chunks_beyond)
        self.passes = admission.passes
        started = [members[index] for index in admission.started]
        self.group.start(member for unit in started for member in unit)
        return started, NOTHING if admission.closed else capacity.less(units[index] for index in admission.started)

    def score(
        self, member: Member, num_computed_tokens: int, num_tokens: int, *, last_chunk: bool
    ) -> ScoreMember | None:
        """Count the `num_tokens` tokens that a member has in this step. With its last chunk it lets go of its slot.

        Returns None for a member that generates: it keeps its slot, and the workers do not score it.
        """
        self.tokens += num_tokens
        if member.generation is not None:
            return None
        group = member.group
        if last_chunk:
            group.finish(member)
        return ScoreMember(
            group.job_id, group.group_id, member.req_id, member.probes, member.sequence, num_computed_tokens
        )

    def generated(self, member: Member, token_ids: Sequence[int], *, finished: bool) -> None:
        """Note that a member has written `token_ids`. After the last member a thread starts to compute the rewards, if
        the group has some."""
        member.output += token_ids
        if not finished:
            return
        group, job = member.group, self.job
        assert job is not None and job.rewarder is not None
        group.finish(member)
        job.wrote(len(member.output))
        if group.done and group.rewarded:
            group.await_rewards(job.rewarder.start(group.work.examples, group.completions()))

    def rewards(self) -> Cells | None:
        """(probes, sequences) rewards of the lane's group; None while there are none.

        Raises:
            RewardError: the reward failed, or takes too long; or rollouts failed.
        """
        if self.group is not None and self.group.rollouts is not None:
            return self.group.outcome()
        return None if self.group is None or self.group.scoring is None else self.group.scoring.outcome()

    def waits(self, tokens: int) -> bool:
        """Whether the job goes on only once a thread has the rewards of its group, a front end has played its
        rollouts, a full disk has space, or more tokens may start than `tokens`."""
        assert self.job is not None
        if self.group is None:
            return self.job.status == JobStatus.RUNNING and self.job.waits_for_disk()
        if self.group.answers:
            return True
        if self.group.scoring is None:
            return self.group.waits and self.smallest > tokens
        return not self.group.scoring.ready

    @property
    def writes(self) -> bool:
        """Whether members that the lane may offer now write."""
        if self.group is not None:
            return self.group.generates
        return self.job is not None and self.job.writes

    @property
    def held_up(self) -> bool:
        """Whether members wait to start, rollouts are played, or the disk is full."""
        members = self.group is not None and (self.group.waits or self.group.answers)
        return members or (self.job is not None and self.job.recorder.error is not None)

    @property
    def scored(self) -> bool:
        """Whether the group can close, for one whose members the workers score."""
        return self.group is not None and self.group.done and not self.group.rewarded

    def close(self, cells: Cells | None = None) -> tuple[PerturbationGroup, list[Command]]:
        """Close the group, all of whose losses will be there; returns it and what the workers do with them.

        Args:
            cells: (probes, sequences) rewards of a group that has some.
        """
        group, self.group = self.group, None
        assert group is not None and self.job is not None
        group.close(cells)
        if group.work.plan.of_base and group.work.sampling_seeds:
            self.job.base_wrote(group.work, group.completions())
        commands: list[Command] = [CloseGroup(group.job_id, group.group_id, group.work.learning_rate, cells)]
        if group.work.reports_cells:
            commands = [ReportCells(group.job_id, group.group_id, cells)]
        if group.work.writes:
            assert cells is not None
            commands += self.job.generated(group.work, group.completions(), cells)
        # In this order: what follows publishes or saves the state that CloseGroup has updated.
        return group, [*commands, *self.job.after(group.work)]

    def drop(self) -> list[Command]:
        """Cancel the group; if the job goes on, it issues the work again."""
        if self.group is None:
            return []
        group, self.group = self.group, None
        assert self.job is not None
        group.drop()
        self.job.take_back(group.work)
        return [DropGroup(group.job_id, group.group_id)]


def make_lanes(count: int, slots_per_lane: int, block_size: int) -> list[Lane]:
    return [Lane(i * slots_per_lane, slots_per_lane, block_size) for i in range(count)]


def enter(lanes: Sequence[Lane], job: Job) -> bool:
    """Give `job` a free lane; returns False when there is none."""
    free = next((lane for lane in lanes if lane.job is None), None)
    if free is None:
        return False
    free.tokens = min((lane.tokens for lane in lanes if lane.job is not None), default=0)
    free.job = job
    return True


def start(lanes: Sequence[Lane], capacity: Capacity, in_chunks_beyond: int) -> list[Member]:
    """Members of all lanes that start in this step; `lanes` choose in their order.

    Members of a lane and probe are adjacent: the workers then need one matrix product for them.

    Args:
        in_chunks_beyond: see `admission.admit`.
    """
    offered: list[Member] = []
    waiting: list[Lane] = []
    for lane in lanes:
        units, capacity = lane.start(capacity, UNLIMITED if offered else in_chunks_beyond)
        for earlier in waiting:
            earlier.passes += len(units)
        if lane.group is not None and lane.group.waits:
            waiting.append(lane)
        offered += sorted((m for unit in units for m in unit), key=lambda m: (m.probe, m.sequence))
    return offered


def by_need(lanes: Sequence[Lane]) -> list[Lane]:
    """Occupied lanes, ordered by the tokens they have had: the fewest first."""
    return sorted((lane for lane in lanes if lane.job is not None), key=lambda lane: lane.tokens)
