"""The perturbation group: the probes of one estimate times the sequences of one mini-batch.

A group owns everything about itself: its work, its members, the slots that they refer to, and how far it has come
(`Phase`). The lane that opened it moves it on; the controller keeps it until its result is back.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

from vllm_zo.checkpoint.seed_log.format import RowsSoFar
from vllm_zo.commands import PROBE_NAME
from vllm_zo.engine.admission import Unit, plan_waves
from vllm_zo.engine.rewarder import Cells, Scoring
from vllm_zo.engine.rollouts import Answer, Rollouts, probe_path
from vllm_zo.engine.slot_table import SlotTable
from vllm_zo.errors import RewardError
from vllm_zo.methods.plan import ProbePlan
from vllm_zo.objectives.base import EncodedExample, Generation
from vllm_zo.objectives.cells import flatten_sequences


@dataclass(frozen=True)
class Work:
    """What a group does: a training step, a piece of an evaluation or of a pass of the base (`base_pass.py`), or to
    write what later steps score (`generations.py`)."""

    plan: ProbePlan
    example_ids: tuple[int, ...]
    examples: tuple[EncodedExample, ...]
    learning_rate: float | None
    """None: the group does not train."""
    last_of_evaluation: bool = False
    sampling_seeds: tuple[int, ...] = ()
    """One for each sequence that is continued or played. All probes share them, so that they differ by their weights
    only."""
    shard: int | None = None
    """Its number, for a shard of a training step: the group reports its cells, and updates nothing. None: the group is
    a whole step, or a piece of an evaluation."""
    appended: RowsSoFar | None = None
    """`StepRecord.appended` of the step."""
    writes: bool = False
    """Whether its completions are for later steps to score."""

    @property
    def trains(self) -> bool:
        return self.learning_rate is not None

    @property
    def evaluates(self) -> bool:
        return not self.trains and not self.plan.of_base and not self.writes

    @property
    def reports_cells(self) -> bool:
        """Whether the workers answer with the group's scores, and the job says what follows from them."""
        return self.shard is not None or self.plan.of_base


class Phase(Enum):
    """How far a group has come."""

    OPEN = auto()
    """Its members are being scheduled; members that generate are writing, rollouts are played."""
    REWARDING = auto()
    """All members have written, and a thread computes their rewards."""
    IN_FLIGHT = auto()
    """The scheduler has told the workers to close it. Its slots are free, its result is not back yet."""
    DROPPED = auto()
    """Cancelled before it closed. Members that vLLM still runs are aborted."""


@dataclass(eq=False)
class Member:
    """One sequence under one probe: an ordinary request that names a ZO slot.

    Where probes differ in the LM head alone, and nothing is written, one member stands for all of a wave: the layers
    compute it once, and the workers score its hidden states with each probe.
    """

    group: PerturbationGroup
    probes: tuple[int, ...]
    sequence: int
    slot: int
    """Of the first of its probes."""
    req_id: str
    token_ids: tuple[int, ...]
    generation: Generation | None = None
    sampling_seed: int = 0
    """The same for all probes of a sequence."""
    kv_of_base: bool = False
    """Whether its probe leaves the KV as the base computes it."""
    output: list[int] = field(default_factory=list)
    """What a member that generates has written so far."""
    scored: bool = False
    """True once its last prompt token is scheduled: the workers write its cells by the end of that engine step. For a
    member that generates: true once it has finished."""
    request: Any = None
    """vLLM's request, while there is one. A preempted member keeps it: it holds the tokens that were generated."""

    @property
    def probe(self) -> int:
        """The first of its probes: with the sequence it names the member in its group."""
        return self.probes[0]

    @property
    def kv_tokens(self) -> int:
        """The most tokens that it can have: its prompt, and those that it generates or the one that vLLM samples."""
        return len(self.token_ids) + (1 if self.generation is None else self.generation.max_tokens)


class PerturbationGroup:
    """Tracks which members are pending and which have been scheduled to the end of their prefill.

    A group closes when its last member is *scheduled*, not when outputs are back: the device executes its work in the
    order in which it was given. A group whose members generate closes when it has their rewards.

    Args:
        slots: the lane's share. Every wave takes one slot a probe, and pins it for all members of the probe.
        block_size: tokens of a KV block.
        probes_at_once: the most probes that may be materialised together; None: as many as there are slots.
        rollouts: of a group whose members a front end plays; the engine schedules none of them.
        kv_of_base: see `Member.kv_of_base`.
    """

    def __init__(
        self,
        group_id: str,
        job_id: str,
        work: Work,
        slots: SlotTable,
        block_size: int,
        probes_at_once: int | None = None,
        rollouts: Rollouts | None = None,
        kv_of_base: bool = False,
    ) -> None:
        self.group_id, self.job_id, self.work = group_id, job_id, work
        self.phase = Phase.OPEN
        self.opened_at = time.monotonic()
        self.sequences = flatten_sequences(work.examples)
        self.rollouts, self._kv_of_base = rollouts, kv_of_base
        self._one_for_all = kv_of_base and rollouts is None and not work.sampling_seeds
        self.scoring: Scoring | None = None
        """Computes the rewards, once all members have written."""
        self.cells: Cells | None = None
        """(probes, sequences) rewards that the group was closed with."""
        self._slots, self._block_size = slots, block_size
        self._waves = plan_waves(work.plan.probes, len(slots), probes_at_once)
        self._wave = -1
        self._pending: dict[tuple[int, int], Member] = {}
        """(probe, sequence) -> member of the current wave that has yet to start."""
        self._playing: dict[tuple[int, int], Member] = {}
        """(probe, sequence) -> rollout that a front end plays."""
        self._placement: dict[int, int] = {}
        """Probe -> slot, in the current wave."""
        self._unscored = 0
        """Members of the current wave that are not `scored`."""
        self._completions: dict[tuple[int, int], list[int]] = {}

    @property
    def rewarded(self) -> bool:
        """Whether its losses are rewards, which are computed outside the workers."""
        return bool(self.work.sampling_seeds) and not self.work.plan.of_base

    @property
    def generates(self) -> bool:
        """Whether its members write."""
        return any(sequence.generation is not None for sequence in self.sequences)

    @property
    def wave_done(self) -> bool:
        """Whether no member of the current wave is left to schedule (true before the first wave as well)."""
        return self._unscored == 0

    @property
    def waits(self) -> bool:
        """Whether members of the current wave have yet to start in the engine."""
        return bool(self._pending) and self.rollouts is None

    @property
    def done(self) -> bool:
        """Whether all members of all waves are scored."""
        return self.wave_done and self._wave == len(self._waves) - 1

    # --- waves and members ------------------------------------------------------------------------------------------

    def open_wave(self) -> dict[int, int]:
        """Give the slots of the last wave back and start the next one; returns probe -> slot."""
        assert self.phase is Phase.OPEN and self.wave_done and not self.done
        self._slots.release(self.group_id)
        self._wave += 1
        wave = self._waves[self._wave]
        # A lane may have more slots than the wave has probes.
        placement = dict(zip(wave, self._slots.free, strict=False))
        assert len(placement) == len(wave), "fewer free slots than probes in the wave"
        self._placement = placement
        for slot in placement.values():
            self._slots.acquire(slot, self.group_id, pins=len(self.sequences))
        for probes in [tuple(placement)] if self._one_for_all else [(probe,) for probe in placement]:
            self._pending |= {(probes[0], index): self._member(probes, index) for index in range(len(self.sequences))}
        self._unscored = len(self._pending)
        return placement

    def _member(self, probes: tuple[int, ...], index: int) -> Member:
        sequence, generation = self.sequences[index], self.sequences[index].generation
        if generation is not None and self.work.evaluates:
            generation = replace(generation, temperature=0.0)  # an evaluation is greedy
        slot, req_id = self._placement[probes[0]], f"{self.group_id}/{probes[0]}/{index}"
        seed = self.work.sampling_seeds[index] if self.work.sampling_seeds else 0
        return Member(self, probes, index, slot, req_id, sequence.token_ids, generation, seed, self._kv_of_base)

    def units(self) -> tuple[list[Unit], list[list[Member]]]:
        """Pending members by (direction, sequence): the cost of each unit for `admission.admit`, and its members."""
        # The key of a centre (sign 0) names no direction: without the sign it could join the direction of that key.
        by_unit: dict[tuple[int, bool, int], list[Member]] = {}
        for (probe, sequence), member in self._pending.items():
            p = self.work.plan.probes[probe]
            by_unit.setdefault((p.key, p.sign == 0, sequence), []).append(member)
        members = list(by_unit.values())
        return [self._cost(unit) for unit in members], members

    def _cost(self, members: list[Member]) -> Unit:
        return Unit(
            members=len(members),
            # A preempted member has lost its KV: it prefills again what it has written, too.
            tokens=sum(len(m.token_ids) + len(m.output) for m in members),
            kv_blocks=sum(-(-m.kv_tokens // self._block_size) for m in members),
            to_write=sum(m.kv_tokens - len(m.token_ids) - len(m.output) - 1 for m in members),
        )

    def start(self, members: Iterable[Member]) -> None:
        for member in members:
            del self._pending[member.probe, member.sequence]

    def put_back(self, member: Member) -> None:
        """Let a member start again that was offered and not scheduled, or was preempted before it was scored. A member
        of a dropped group does not."""
        if self.phase is Phase.OPEN:
            self._pending[member.probe, member.sequence] = member

    def finish(self, member: Member) -> None:
        """Note that the member is scored: it does not refer to the slots of its probes any more."""
        assert not member.scored and (member.probe, member.sequence) not in self._pending
        member.scored = True
        self._unscored -= 1
        for probe in member.probes:
            self._slots.unpin(self._placement[probe])
        if member.generation is not None:
            self._completions[member.probe, member.sequence] = member.output

    # --- rollouts ---------------------------------------------------------------------------------------------------

    def hand_out(self) -> list[dict[str, Any]]:
        """The rollouts of the current wave that no front end has got yet, as plain values for the one that asks."""
        members = list(self._pending.values())
        self._playing |= self._pending
        self._pending = {}
        return [self._described(member) for member in members]

    def _described(self, member: Member) -> dict[str, Any]:
        last = str(member.probe) if self.work.trains else "eval"
        row, sample = divmod(member.sequence, self._samples)
        return {
            "group": self.group_id,
            "probe": member.probe,
            "sequence": member.sequence,
            "model": f"{PROBE_NAME}{self.job_id}/{self.work.plan.step}/{last}",
            "path": probe_path(self.group_id, member.probe),
            "trains": self.work.trains,
            "step": self.work.plan.step,
            "example": self.work.example_ids[row],
            "sample": sample,
            "seed": member.sampling_seed,
        }

    def played(self, answer: Answer) -> None:
        """Take in the end of a rollout. Anything but the first answer to it is ignored."""
        member = self._playing.pop((answer.probe, answer.sequence), None)
        if member is None or self.phase is not Phase.OPEN:
            return
        assert self.rollouts is not None
        self.rollouts.note(answer)
        self.finish(member)

    def slot_of(self, probe: int) -> int | None:
        """The slot in which a probe answers the requests of its rollouts; None if it does not answer any more, or not
        yet."""
        return self._placement.get(probe) if self.answers else None

    @property
    def answers(self) -> bool:
        """Whether probes of the current wave answer requests of rollouts."""
        failed = self.rollouts is None or self.rollouts.failure is not None
        return not failed and not self.wave_done and self.phase is Phase.OPEN

    def outcome(self) -> Cells | None:
        """(probes, sequences) rewards of rollouts, or None while some are played. Raises RewardError: the job must
        fail."""
        assert self.rollouts is not None
        if self.rollouts.failure is not None:
            raise RewardError(self.rollouts.failure)
        if not self.done:
            return None
        return self.rollouts.cells(len(self.work.plan.probes), len(self.sequences), self._samples)

    @property
    def _samples(self) -> int:
        """Rollouts of a row under each probe."""
        return len(self.sequences) // len(self.work.examples)

    # --- how it ends ------------------------------------------------------------------------------------------------

    def completions(self) -> list[list[int]]:
        """What the members have written, probe by probe, in the order of the sequences."""
        probes, sequences = len(self.work.plan.probes), len(self.sequences)
        return [self._completions[p, s] for p in range(probes) for s in range(sequences)]

    def await_rewards(self, scoring: Scoring) -> None:
        assert self.phase is Phase.OPEN and self.done and self.rewarded
        self.phase, self.scoring = Phase.REWARDING, scoring

    def close(self, cells: Cells | None = None) -> None:
        """Give the slots back: all losses will be there before the workers execute what rewrites a slot.

        Args:
            cells: (probes, sequences) rewards of a group that has some.
        """
        assert self.done and self.phase is (Phase.OPEN if self.scoring is None else Phase.REWARDING)
        assert (cells is not None) == self.rewarded
        self.phase, self.cells = Phase.IN_FLIGHT, cells
        self._slots.release(self.group_id)

    def drop(self) -> None:
        """Cancel the group; it changes nothing. The scheduler aborts its members before the slots are given away."""
        assert self.phase in (Phase.OPEN, Phase.REWARDING)
        self.phase = Phase.DROPPED
        self._slots.release(self.group_id, force=True)
