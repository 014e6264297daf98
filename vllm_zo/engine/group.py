"""The perturbation group: the probes of one estimate times the rows of one mini-batch, as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vllm_zo.engine.admission import Unit, plan_waves
from vllm_zo.methods.base import ProbePlan
from vllm_zo.objectives.base import EncodedExample, Generation, ScoringRow

if TYPE_CHECKING:
    from vllm_zo.engine.rewarder import Scoring


@dataclass
class Member:
    """One row under one probe: an ordinary request that names a ZO slot."""

    req_id: str
    group_id: str
    probe: int
    row: int
    token_ids: tuple[int, ...]
    slot: int
    generation: Generation | None = None
    seed: int = 0
    """Of sampling; the same for all probes of a row."""
    output: list[int] = field(default_factory=list)
    """What a member that generates has written so far."""
    scored: bool = False
    """Its last prompt token has been scheduled: its cells are written by the end of that engine step. One that
    generates has finished."""

    @property
    def kv_tokens(self) -> int:
        """Tokens it may come to."""
        return len(self.token_ids) + (1 if self.generation is None else self.generation.max_tokens)


@dataclass
class PerturbationGroup:
    """Tracks which members are pending and which have been scheduled to the end of their prefill.

    The group closes when its last member is *scheduled*, not when outputs are back: what runs on the device is in
    order. One whose members generate is done when the last of them has finished, and closes when it has its rewards.
    """

    group_id: str
    job_id: str
    plan: ProbePlan
    examples: tuple[EncodedExample, ...]
    learning_rate: float | None
    slots: int
    block_size: int
    seeds: tuple[int, ...] = ()
    """One a row, where rows are generated from."""
    in_place: bool = False
    """Probes are written into the base weights: one a wave."""
    rows: list[ScoringRow] = field(init=False)
    waves: list[tuple[int, ...]] = field(init=False)
    wave: int = field(init=False, default=-1)
    pending: dict[tuple[int, int], Member] = field(init=False, default_factory=dict)
    unfinished: int = field(init=False, default=0)
    completions: dict[tuple[int, int], list[int]] = field(init=False, default_factory=dict)
    """(probe, row) -> token ids, of members that have generated."""
    scoring: Scoring | None = field(init=False, default=None)
    """The rewards in the making, once all members have generated."""

    def __post_init__(self) -> None:
        self.rows = [row for example in self.examples for row in example.rows]
        whole = plan_waves(self.plan.probes, self.slots)
        self.waves = [(probe,) for wave in whole for probe in wave] if self.in_place else whole

    @property
    def generates(self) -> bool:
        return bool(self.seeds)

    @property
    def wave_done(self) -> bool:
        """No member of the current wave is left to schedule (true before the first wave as well)."""
        return self.unfinished == 0

    @property
    def done(self) -> bool:
        return self.wave_done and self.wave == len(self.waves) - 1

    def open_wave(self, slots: Sequence[int]) -> dict[int, int]:
        """Start the next wave in the given free slots; returns probe -> slot."""
        assert self.wave_done and not self.done
        self.wave += 1
        placement = dict(zip(self.waves[self.wave], slots, strict=False))
        assert len(placement) == len(self.waves[self.wave]), "fewer free slots than probes in the wave"
        for probe, slot in placement.items():
            for index, row in enumerate(self.rows):
                req_id = f"{self.group_id}/{probe}/{index}"
                self.pending[probe, index] = Member(
                    req_id, self.group_id, probe, index, row.token_ids, slot, self._generation_of(row),
                    self.seeds[index] if self.seeds else 0,
                )  # fmt: skip
        self.unfinished = len(self.pending)
        return placement

    def _generation_of(self, row: ScoringRow) -> Generation | None:
        if row.generation is None or self.learning_rate is not None:
            return row.generation
        return replace(row.generation, temperature=0.0)  # an evaluation is greedy

    def _units(self) -> Iterator[list[Member]]:
        """Pending members by (direction, row)."""
        by_unit: dict[tuple[int, bool, int], list[Member]] = {}
        for (probe, row), member in self.pending.items():
            p = self.plan.probes[probe]
            by_unit.setdefault((p.seed, p.sign == 0, row), []).append(member)
        yield from by_unit.values()

    def units(self) -> tuple[list[Unit], list[list[Member]]]:
        """What wants to start, for `admission.admit`, with the members behind each unit."""
        members = list(self._units())
        return [
            Unit(
                members=len(unit),
                tokens=sum(len(m.token_ids) + len(m.output) for m in unit),
                kv_blocks=sum(-(-m.kv_tokens // self.block_size) for m in unit),
            )
            for unit in members
        ], members

    def start(self, members: Iterable[Member]) -> None:
        for member in members:
            del self.pending[member.probe, member.row]

    def put_back(self, member: Member) -> None:
        """A member that was offered and not scheduled, or preempted before its prefill was complete."""
        self.pending[member.probe, member.row] = member

    def finish(self, member: Member) -> None:
        assert not member.scored and (member.probe, member.row) not in self.pending
        member.scored = True
        self.unfinished -= 1
        if self.generates:
            self.completions[member.probe, member.row] = member.output
