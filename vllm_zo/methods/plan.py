"""The plain data of a step: modules, probes and plans. This file imports nothing of the package, so any may import it.

Notation (shape suffixes in dense code): O out features, I in features, R rank, K directions, P probes, E examples,
N trained numbers of all modules together, B bases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ModuleShape:
    """One weight as Hugging Face names it, before vLLM fuses weights: q_proj, k_proj and v_proj are three modules.

    An embedding counts as a linear layer with a one-hot input, so its in features are the tokens of the vocabulary.
    """

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Probe:
    """One parameter state to score: `state + sign * eps * direction(key)`. Equal keys give equal directions."""

    key: int
    sign: int  # +1, -1, or 0 for the centre
    eps: float
    of_base: bool = False
    """The base model instead, without what the job has learnt. (In `fold` space that is lost with the first fold.)"""


@dataclass(frozen=True)
class ProbePlan:
    """The probes of one step. Probes of one direction are adjacent: (+d0, -d0, +d1, -d1, ...)."""

    step: int
    probes: tuple[Probe, ...]
    basis: int
    """Index of the basis (V). If it differs from that of the step before, the worker refreshes V before this step. In
    `fold` space it folds the accumulator first."""

    part_of: tuple[int, ...] = ()
    """Of a plan that holds a part of a step's probes: the keys of all directions of the step."""

    @property
    def keys(self) -> tuple[int, ...]:
        """The distinct keys of the step's directions, in order of first appearance. The centre has none."""
        return self.part_of or tuple(dict.fromkeys(p.key for p in self.probes if p.sign))

    @property
    def of_base(self) -> bool:
        """Whether it scores the base, as a reference (`objectives.base.ReferencedObjective`)."""
        return self.probes[0].of_base

    def part(self, probes: Sequence[int]) -> ProbePlan:
        """The plan with these probes only, by index. Its directions keep their numbers in the step."""
        return replace(self, probes=tuple(self.probes[index] for index in probes), part_of=self.keys)

    def scaled(self, factor: float) -> ProbePlan:
        """The plan with every radius multiplied by `factor` (an eps schedule)."""
        if factor == 1.0:
            return self
        return replace(self, probes=tuple(replace(p, eps=p.eps * factor) for p in self.probes))
